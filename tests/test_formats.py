"""The checks of formats where they really run: in workers, found by name, with nothing fetched and nothing installed that is optional."""
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from synthlab.checks.formats import check_schema, check_xml, verify_all
from synthlab.checks.verify import MAX_CHARACTERS, VerifierPool

ROOT = Path(__file__).resolve().parent.parent
SETUP = "CREATE TABLE t(a INT, b TEXT); INSERT INTO t VALUES (1, 'x'), (2, 'y'), (2, 'z');"
LEASE = {"1": "The tenant shall pay the rent on the first day of each month."}
# kind: (right, wrong, cannot be judged), each (answer, gold, context)
CASES = {
    "schema": [("Here: [5]", '{"items": {"type": "integer"}}', None), ('{"a": 1}', None, {"schema": {"required": ["b"]}}), ("{}", '{"type": 5}', None)],
    "table": [("| b | a |\n|---|---|\n| x | 1.0 |", "a,b\n1,x", None), ("a,b\n1,y", "a,b\n1,x", None), ("a,b\n1,y", "no table", None)],
    "xml": [("<a y='1' x='2'/>", '<a x="2" y="1"/>', None), ("<a>", None, {"required": ["a"]}), ("<!DOCTYPE a><a/>", "<a/>", None)],
    "sql": [("SELECT a FROM t", "SELECT a FROM t ORDER BY a", {"setup": SETUP}), ("DROP TABLE t", "SELECT 1", {"setup": SETUP}), ("SELECT 1", "SELECT 1", {"setup": "nonsense"})],
    "units": [("5000 m/h", "5 km/h", None), ("5 kg", "5 km/h", None), ("5 blips", "5 km/h", None)],
    "constraint": [("x = 3, y = 7", "x + y == 10", None), ("x = 3", None, {"constraints": ["x == 4"]}), ("x = 3", "x.real == 3", None)],
    "instructions": [("one two", None, {"instructions": [{"kind": "words", "exactly": 2}]}), ("one", None, {"instructions": [{"kind": "words", "exactly": 2}]}),
                     ("one", None, {"instructions": [{"kind": "wrods", "exactly": 2}]})],
    "citations": [('"shall pay the rent" [1]', None, {"sources": LEASE}), ('"shall not pay the rent" [1]', None, {"sources": LEASE}), ("[1]", None, {"sources": 5})],
    "all": [("7", None, {"checks": [{"kind": "exact", "gold": "7"}]}), ("7", None, {"checks": [{"kind": "exact", "gold": "8"}]}), ("7", None, {"checks": [{"kind": "regex", "gold": "("}]})],
    "any": [("7", None, {"checks": [{"kind": "exact", "gold": "7"}]}), ("7", None, {"checks": [{"kind": "exact", "gold": "8"}]}), ("7", None, {"checks": []})],
    "weighted": [("7", None, {"checks": [{"kind": "exact", "gold": "7"}]}), ("7", None, {"checks": [{"kind": "exact", "gold": "8"}]}), ("7", None, {"checks": [{"kind": "units", "gold": "8 x"}]})],
}


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(workers=2, timeout=20.) as p: yield p


def test_every_kind_in_a_worker(pool):
    rows = [(kind, case, value) for kind, cases in CASES.items() for case, value in zip(cases, (True, False, None))]
    verdicts = pool.verify_many([case for _, case, _ in rows], [kind for kind, _, _ in rows])
    assert [(k, c, v.value, v.cause) for (k, c, value), v in zip(rows, verdicts) if v.value is not value] == []


def test_kinds_are_found_by_name_in_a_fresh_process():
    code = "from synthlab.checks.verify import verify\nif __name__ == '__main__': print(verify('5000 m/h', '5 km/h', 'units').value, verify('5', '{\"type\": \"integer\"}', 'schema').value)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.parametrize("module,kind,case", [("jsonschema", "schema", "'1', '{}', None"), ("pint", "units", "'1 m', '1 m', None")])
def test_a_missing_library_names_its_install_line(module, kind, case):
    code = f"import sys; sys.modules[{module!r}] = None\nfrom synthlab.checks import formats\nformats.check_{kind}({case})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert f"MissingExtra: {module!r} is not installed; run: pip install 'synthlab[checks]'" in done.stderr


def test_nothing_is_fetched():
    "A server that counts its visitors stands where a reference and a document type point; the checks run here, where no worker keeps them from the network."
    seen = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        stop = threading.Event()
        def wait():
            while not stop.is_set():
                try: server.accept()[0].close()
                except TimeoutError: continue
                seen.append(1)
        thread = threading.Thread(target=wait)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
            with socket.create_connection(server.getsockname()): pass  # the counter counts
            found = [check_schema("1", f'{{"$ref": "{url}"}}', None), check_schema("1", f'{{"$schema": "{url}"}}', None),
                     *(check_xml(a, "<a/>", None) for a in (f'<!DOCTYPE a SYSTEM "{url}"><a/>', f'<!DOCTYPE a [<!ENTITY e SYSTEM "{url}">]><a>&e;</a>',
                                                            f'<a xmlns:s="http://www.w3.org/2001/XMLSchema-instance" s:schemaLocation="{url}"/>'))]
        finally:
            stop.set()
            thread.join()
    assert len(seen) == 1 and [v[0] for v in found] == [None, True, None, None, False]


SEEDS = ["a", " ", "\n", "[", "]", "(", '"', "“", "'", "*", "-", "|", "-:", ",", "\t", "<", "<<", ">", "<a>", "</a>", "<a x='", "&", "`", "```\n", "~~~x\n", ".", ". ", "Dr. ", "\n ", "> ", "> a\n", "{", '{"a":', "[1]", "[1,",
         "(source: ", "(source:a)", "\\text{", "5 m ", "5", "5*", "x=1,", "x = ", "1,1", "SELECT ", "/*", "--", "ORDER BY ", '"a b c" ', '"a b c" [1] ', "S 1", "a\n\n", "***", "P.", "<!--", "|---|\n", "a,b\n", "1|2\n", "。", "...x", "()", "!!x", "\ud800", "\0"]


@pytest.mark.parametrize("kind", [k for k in CASES if k not in ("all", "any", "weighted")])
def test_no_text_of_any_length_runs_out_of_time(pool, kind):
    "A hundred thousand characters of whatever trips a pattern, with an end that does not fit, in and out of the middle of a text."
    instructions = [{"kind": k, "at_most": 5} for k in ("sentences", "bullets", "placeholders", "highlights", "capital_words")] + [{"kind": "sections", "marker": "S", "at_most": 3}]
    instructions += [{"kind": k} for k in ("title", "json", "two_responses", "postscript", "quoted")] + [{"kind": "headings", "headings": ["a"]}, {"kind": "paragraphs", "divider": "***", "exactly": 2}]
    _, gold, context = CASES[kind][0]
    context = {"instructions": instructions} if kind == "instructions" else {**(context or {}), "columns": "any", "ordered": False}
    texts = [t for s in SEEDS for t in (s * (MAX_CHARACTERS // len(s)), ("x " + s * (MAX_CHARACTERS // len(s)))[:MAX_CHARACTERS - 1] + "!")]
    texts += [opening + filler * ((MAX_CHARACTERS - 20) // len(filler)) for opening in ("[", "(source: ", "<a x='", "x = 5", "5 ", "SELECT '", "- ", "<<") for filler in ("a", " ", "1,")]
    verdicts = pool.verify_many([(t, gold, context) for t in texts], kind)
    assert [(t[:12], v.cause) for t, v in zip(texts, verdicts) if v.value is None and v.cause in ("timeout", "crash", "out of memory") or v.seconds > 5] == []


def test_compositions_from_many_threads(pool):
    "Composed checks borrow workers of the shared pool while their own pool waits for them: none may wait for itself."
    nested = {"checks": [{"kind": "any", "context": {"checks": [{"kind": "schema", "gold": '{"type": "integer"}'}, {"kind": "all", "context": {"checks": [{"kind": "exact", "gold": "7"}]}}]}}]}
    answers = [str(i) for i in range(20)] + ["x"] * 20
    found = []
    def work(): found.append([v.value for v in pool.verify_many([(a, None, nested) for a in answers], "all")])
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join(120)
    assert found == [[True] * 20 + [False] * 20] * 4
    assert verify_all("7", [{"kind": "sql", "gold": "SELECT 7", "context": {"setup": ""}}, {"kind": "exact", "gold": "7"}], pool, "any").value is True
