"""The formal checks against texts that were written to deceive them, in threads, in workers that can be killed, and inside their limits."""
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthlab.checks import formal
from synthlab.checks.formal import (
    BadInput, Judged, Limits, ProverUnavailable, Script, SynthlabError, Task, Verdict, change_number, check_claim, check_coq, check_derivation, check_proof, check_smt, confined, find_proof,
    find_script, find_value, formalise, formula, judge_lean, mutants, numbers_in, prove, prove_tptp, read_assumptions, read_lean, read_script, read_szs, read_terms, read_tptp, read_value,
    same_numbers, smt, write_term,
)
from synthlab.checks.verify import VerifierPool, extract_answer, verify
from synthlab.core import MissingExtra
from synthlab.lm.backends import Stub

ROOT = Path(__file__).resolve().parent.parent
needs = lambda *programs: pytest.mark.skipif(not all(map(shutil.which, programs)), reason=f"not installed: {', '.join(p for p in programs if not shutil.which(p))} (see formal.find_prover)")
needs_coq, needs_e, needs_box = needs("coqc", "bwrap", "prlimit"), needs("eprover", "prlimit"), needs("bwrap", "prlimit")


# --- every parser: a typed error, or a result, whatever the text

SMT = ["(", ")", "(", ")", "assert", "declare-const", "declare-fun", "define-fun", "check-sat", "set-option", ":produce-models", "x", "y", "|x y|", "Int", "Real", "Bool", "0", "1.5", "true", "=", "+", "-", "*", "/",
       "div", "mod", "and", "not", "let", "forall", "ite", "((x 1))", "((x Int))", "; c\n", '"s"', "#b1", "(declare-const x Int)", "(assert (= x 1))", "\\", "|", "\x00", "é"]
INFIX = ["x", "y", " ", "(", ")", "+", "-", "*", "**", "/", "//", "%", "==", "<=", "<", " and ", " or ", "not ", "1", "2.5", "1e9", "0x1f", "1_0", "'s'", ",", ":", "implies(", "distinct(", "lambda", "[", "]", "\n", "\\", "#", "é"]
TPTP = ["fof(", "cnf(", "include(", "a", ",", "axiom", "conjecture", ")", ".", "(", "[", "]", "!", "?", "X", ":", "=>", "&", "~", "$true", "'q'", '"d"', "%c\n", "/*", "*/", " ", "p(X)", "=", "é", "\\"]
TALK = ["Axioms:", "\n", "foo : nat", "Closed under the global context", " ", "  : ", "# SZS status Theorem", "% SZS status ", "J.lean:1:2: error: no", "J.lean:99999999999999999999:2: warning: sorry", "'synthlab_goal' depends on axioms: [", "]",
        "'synthlab_goal' does not depend on any axioms", '{"severity":"error","pos":{"line":3},"data":"x"}', '{"severity":"error","pos":7}', "[" * 50, "{", "é", "```", "```smt\n", "(declare-const x Int)", "12", " half ", "1,000", "3.5", "x = 3", "A: ", "\\frac{1}{0}"]


def texts(parts):
    return st.text(max_size=30) | st.lists(st.sampled_from(parts) | st.text(max_size=2), max_size=16).map("".join) | st.binary(max_size=30).map(lambda b: b.decode("utf-8", "surrogateescape"))


def calm(f, *args):
    "Call a parser; only this library's own errors may come out."
    try: return f(*args)
    except SynthlabError: return None


@settings(max_examples=200, deadline=None)
@given(texts(SMT))
def test_smt_parsers_raise_nothing_of_their_own(text):
    terms = calm(read_terms, text)
    if terms is not None: assert read_terms(" ".join(map(write_term, terms))) == terms
    script = calm(read_script, text)
    if script is not None:
        assert calm(read_script, script.text) is not None
        for _, m in mutants(script): assert calm(read_script, m.text) is not None
    calm(formula, text), calm(find_script, text), calm(find_value, text, "x", "z3", .2)


def _apply(ops, *parts): return st.builds(lambda op, *args: f"({op} {' '.join(args)})", st.sampled_from(ops.split()), *parts)


INT = st.deferred(lambda: st.sampled_from(["x", "y", "0", "1", "7", "(- 3)"]) | _apply("+ - * div mod", INT, INT) | _apply("- abs f", INT) | _apply("ite", BOOL, INT, INT) | INT.map(lambda t: f"(let ((x {t})) (+ x y))"))
BOOL = st.deferred(lambda: st.sampled_from(["p", "q", "true"]) | _apply("= < <= > >= distinct", INT, INT) | _apply("= < distinct", INT, INT, INT) | _apply("and or => xor = distinct", BOOL, BOOL) | _apply("not", BOOL))
JUNK = st.sampled_from(["(= x unheard)", "(= x true)", "(f)", "(not x)", "(forall ((z Int)) (> z x))", "(let x)", "#b1", "()", "(= x 0.5)", "(_ x)", "(! p :named n)", "(exists () p)"])


@settings(max_examples=60, deadline=None)
@given(st.lists(BOOL | BOOL | BOOL | JUNK, min_size=1, max_size=3))
def test_solvers_and_substitution_agree_on_random_scripts(formulas):
    text = "(declare-const x Int)(declare-const y Int)(declare-const p Bool)(declare-const q Bool)(declare-fun f (Int) Int)" + "".join(f"(assert {f})" for f in formulas)
    found = [calm(check_smt, text, solver, .1) for solver in ("z3", "cvc5", "both")]
    for s in found: assert s is None or s.status in ("sat", "unsat", "unknown") and s.cause and "fails assertion" not in s.cause, (text, s)
    assert {"sat", "unsat"} - {s.status for s in found if s}, (text, found)


@settings(max_examples=200, deadline=None)
@given(texts(INFIX))
def test_formulas_raise_nothing_of_their_own(text):
    term = calm(formula, text)
    if term is not None: assert formula(write_term(term)) == term
    for sort in ("Int", "Real", "Bool"): calm(read_value, text, sort)
    v = calm(check_claim, text, "p", {"timeout": .2})
    assert v is None or isinstance(v, Verdict)


@settings(max_examples=200, deadline=None)
@given(texts(TPTP))
def test_tptp_raises_nothing_of_its_own(text):
    formulas = calm(read_tptp, text)
    if formulas:
        again = read_tptp("\n".join(f.named("n") for f in formulas))
        assert [f.role for f in again] == [f.role for f in formulas]


@settings(max_examples=200, deadline=None)
@given(texts(TALK))
def test_replies_of_provers_and_models_raise_nothing(text):
    assert isinstance(read_assumptions(text), Judged) and read_szs(text)[0] in (True, False, None)
    assert isinstance(judge_lean(read_lean(text), 3, 6), Verdict)
    for kind in ("smt", "proof"):
        once = extract_answer(text, kind)
        assert once is None or once.strip() and extract_answer(once, kind) == once
    find_script(text), find_proof(text), numbers_in(text), change_number(text), same_numbers(text, text[::-1]), read_value(text, "Real")


@settings(max_examples=60, deadline=None)
@given(texts(TALK + SMT), texts(TALK + SMT))
def test_a_model_may_reply_anything(script, words):
    reply = lambda request: words if "states a word problem" in request.messages[-1]["content"] else script
    (f,) = formalise([Task("t", "Ann has 5 pens and 7 more. How many?")], Stub(reply), timeout=.2, progress=False)
    assert f.verdict.value is not False


# --- solvers

def test_output_options_never_reach_a_solver(tmp_path):
    out = tmp_path / "stolen"
    for option in (":regular-output-channel", ":diagnostic-output-channel"):
        text = f'(set-option {option} "{out}")(declare-const x Int)(assert (= x 1))(check-sat)'
        with pytest.raises(BadInput, match="set-option: not allowed"): check_smt(text)
        assert verify("1", "", "smt", {"script": text, "ask": "x"}).value is None
    assert not out.exists()


def test_many_threads_get_the_same_results():
    claims = [("x * x >= x", True), ("x + 1 > y", False), ("implies(x > y, x >= y + 1)", True), ("x % 2 == 0", False)] * 6
    with ThreadPoolExecutor(8) as threads: found = list(threads.map(lambda c: prove(c[0], ints="x y").value, claims))
    assert found == [v for _, v in claims]


def test_a_solver_that_does_not_come_back_is_killed_with_its_worker():
    cubes = smt("a > 1", "b > 1", "c > 1", "a * a * a + b * b * b == c * c * c", ints="a b c").text
    with VerifierPool(1, timeout=2.) as pool:
        start = time.monotonic()
        out = pool.verify_many([("1", "", {"script": cubes, "ask": "a", "timeout": 600}), ("5", "", {"script": cubes, "ask": "a", "sense": "any", "timeout": 600}), ("p", "p")], "smt")
        assert time.monotonic() - start < 30
    assert [(v.value, v.cause) for v in out[:2]] == [(None, "timeout")] * 2 and out[2].value is True


def test_time_outs_are_honoured():
    cubes = smt("a > 1", "b > 1", "c > 1", "a * a * a + b * b * b == c * c * c", ints="a b c")
    for solver in ("z3", "cvc5"):
        start = time.monotonic()
        found = check_smt(cubes, solver, .5)
        assert (found.status, found.cause) == ("unknown", f"{solver}: timeout") and time.monotonic() - start < 5


def test_texts_that_explode_are_refused_or_unknown():
    chain = lambda n: "(declare-const y Int)(define-fun f0 ((x Int)) Int (+ x 1))" + "".join(f"(define-fun f{i} ((x Int)) Int (+ 1 (f{i - 1} x)))" for i in range(1, n)) + f"(assert (= y (f{n - 1} 0)))"
    assert check_smt(chain(10)).values == {"y": 10}
    with pytest.raises(BadInput, match="when its definitions are written out"): check_smt(chain(40))
    with pytest.raises(BadInput, match="nested more than"): check_smt("(assert " + "(not " * 300 + "true" + ")" * 301)
    with pytest.raises(BadInput, match="the limit is"): check_smt("; " + "x" * 200_000)
    long = check_smt(f"(declare-const x Int)(assert (= x {'9' * 9000}))", timeout=2)
    assert long.status == "unknown" and "could not be checked" in long.cause


def test_missing_solvers_name_their_install_line(monkeypatch):
    for name in ("z3", "cvc5"):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, name, None)
            with pytest.raises(MissingExtra, match=r"pip install 'synthlab\[formal\]'"): check_smt("(assert false)")


def test_importing_the_formal_checks_is_light():
    code = "import sys, synthlab.checks.formal; print([m for m in ('z3', 'cvc5', 'sympy', 'torch', 'jax', 'transformers', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}).stdout == "[]\n"


def test_a_liar_cannot_hide_behind_a_false_sort():
    script = read_script("(declare-const x Int)(declare-fun f (Int) Int)(assert (= (* 2 (f x)) 1))")
    with pytest.raises(formal.Unevaluable, match="not of sort Int"): formal.substitute(script, {"x": ((), "Int", "0"), "f": ((("a", "Int"),), "Int", ("/", "1", "2"))})
    assert formal.substitute(Script(), {}) == (None, {})


# --- first-order proofs

@needs_e
def test_first_order_proofs():
    rules = "fof(a, axiom, ![X]: (man(X) => mortal(X))). fof(b, axiom, man(socrates)). "
    ask = lambda conjecture: prove_tptp(rules + f"fof(c, conjecture, {conjecture}).")
    assert [ask(c).value for c in ("mortal(socrates)", "?[X]: mortal(X)", "mortal(plato)", "![X]: mortal(X)")] == [True, True, False, False]
    assert prove_tptp(rules + "fof(n, axiom, ~man(socrates)). fof(c, conjecture, god(plato)).") == Verdict(None, "E: ContradictoryAxioms", "# SZS status ContradictoryAxioms")
    assert prove_tptp("cnf(a, axiom, p(X)). cnf(b, negated_conjecture, ~p(a)).").value is True and prove_tptp("cnf(a, axiom, p(X)).").value is False
    with pytest.raises(BadInput, match="one conjecture"): prove_tptp("fof(a, conjecture, p). fof(b, conjecture, q).")


@needs_e
def test_derivations_are_judged_step_by_step():
    rules = "fof(a, axiom, ![X]: (man(X) => mortal(X))). fof(b, axiom, man(socrates)). "
    group = "fof(as, axiom, ![X,Y,Z]: m(m(X,Y),Z) = m(X,m(Y,Z))). fof(l, axiom, ![X]: m(e,X) = X). fof(i, axiom, ![X]: m(v(X),X) = e)."
    assert check_derivation("fof(s1, plain, ![X]: m(X,v(X)) = e).", "![X]: m(X,e) = X", group).value is True
    assert check_derivation("fof(s1, plain, ![X,Y]: m(X,Y) = m(Y,X)).", "![X]: m(X,e) = X", group, Limits(timeout=1)).value is not True
    assert check_derivation("fof(s1, axiom, mortal(plato)).", "mortal(plato)", rules).value is False and check_derivation("garbage", "mortal(socrates)", rules).value is False
    for unreadable in ("fof(s, plain, p & q => r).", "fof(s, plain, => p).", "fof(s, plain, X)."): assert check_derivation(unreadable, "mortal(socrates)", rules).value is False, unreadable
    with pytest.raises(BadInput, match="E cannot read"): check_derivation("", "p & q => r", rules)
    with pytest.raises(BadInput, match="E cannot read"): check_derivation("", "p", "fof(a, axiom, => p).")


@needs_e
def test_a_derivation_through_the_registry():
    context = {"prover": "tptp", "preamble": "fof(a, axiom, p). fof(b, axiom, p => q)."}
    assert verify("Modus ponens:\n```tptp\nfof(s, plain, q).\n```", "q & p", "proof", context).value is True
    assert verify("fof(s, axiom, r).", "q & p", "proof", context).value is False


@needs_e
def test_e_keeps_within_its_limits():
    ring = ("a(a(X,Y),Z) = a(X,a(Y,Z))", "a(X,Y) = a(Y,X)", "a(z,X) = X", "a(n(X),X) = z", "m(m(X,Y),Z) = m(X,m(Y,Z))", "m(X,a(Y,Z)) = a(m(X,Y),m(X,Z))", "m(a(X,Y),Z) = a(m(X,Z),m(Y,Z))", "m(X,m(X,X)) = X")
    cubes_commute = "".join(f"fof(r{i}, axiom, ![X,Y,Z]: {e})." for i, e in enumerate(ring)) + "fof(c, conjecture, ![X,Y]: m(X,Y) = m(Y,X))."
    start = time.monotonic()
    assert (v := prove_tptp(cubes_commute, Limits(.2))).value is None and v.cause in ("timeout", "E: ResourceOut") and time.monotonic() - start < 5
    assert prove_tptp(cubes_commute, Limits(60)).value is True


@needs_e
def test_a_derivation_cannot_bring_its_own_axioms():
    rules = "fof(a, axiom, p => q)."
    for steps in ("fof(s, axiom, q).", "fof(s, hypothesis, q).", "fof(s, negated_conjecture, ~q).", "fof(q, conjecture, q).", "fof(s, plain, $false).", "fof(s, axiom, q & ~q)."):
        assert check_derivation(steps, "q", rules).value is False, steps
    assert check_derivation("", "p => q", rules).value is True
    assert check_derivation("fof(s, plain, r).", "q", "fof(a, axiom, p). fof(b, axiom, ~p).") == Verdict(None, "step 1: E: ContradictoryAxioms", "# SZS status ContradictoryAxioms")
    with pytest.raises(BadInput, match="include reads files"): check_derivation("", "q", "include('x').")
    assert check_proof("include('x').", "q", {"prover": "tptp"}).value is False


# --- Coq

STATEMENT = "forall n : nat, n + 0 = n"
SCRIPTS = {
    "Admitted. Theorem other : True. Proof. trivial.": "the proof rests on axioms",
    "admit. Admitted. Theorem other : True. Proof. trivial.": "the proof rests on axioms",
    f"Abort. Axiom goal : {STATEMENT}. Theorem other : True. Proof. trivial.": "the proof rests on axioms",
    f"Abort. Parameter goal : {STATEMENT}. Theorem other : True. Proof. trivial.": "the proof rests on axioms",
    'idtac "Closed under the global context". Admitted. Theorem other : True. Proof. trivial.': "the proof rests on axioms",
    "Abort. Theorem goal : True. Proof. trivial.": "another statement was proved",
    "Abort. Module Goal. Definition statement := True. End Goal. Theorem goal : True. Proof. trivial.": "another statement was proved",
    f"Abort. Section s. Variable H : False. Theorem goal : {STATEMENT}. Proof. destruct H. Qed. End s. Theorem other : True. Proof. trivial.": "another statement was proved",
    f"Abort. Section s. Hypothesis H : False. Theorem goal : {STATEMENT}. Proof. destruct H.": "the proof was rejected",
    "reflexivity.": "the proof was rejected",
    "trivial. (* ": "the proof was rejected",
    "\ud800": "the proof was rejected",
    "exact (fun n => eq_refl n).": "the proof was rejected",
}
FILES = {
    'Notation "a = b" := True : type_scope. Theorem t : 1 = 2. Proof. trivial. Qed.': "another statement was proved",
    'Inductive eq {A} (a b : A) : Prop := anything. Notation "a = b" := (eq a b) : type_scope. Theorem t : 1 = 2. Proof. constructor. Qed.': "another statement was proved",
    "Inductive nat := O. Definition S (n : nat) := n. Theorem t : S O = O. Proof. reflexivity. Qed.": "another statement was proved",
    "Axiom cheat : forall P : Prop, P. Theorem t : 1 = 2. Proof. apply cheat. Qed.": "the proof rests on axioms",
    "Require Import Program. Program Definition t : 1 = 2 := _. Admit Obligations.": "the proof rests on axioms",
    "Section s. Axiom cheat : False. Theorem t : 1 = 2. Proof. destruct cheat. Qed. End s.": "the proof rests on axioms",
    "Module Type T. Parameter p : 1 = 2. End T. Declare Module M : T. Definition t := M.p.": "the proof rests on axioms",
    "Definition t := 1.": "another statement was proved",
    "Theorem u : True. Proof. trivial. Qed.": "another statement was proved",
    "Global Set Printing All. Theorem t : True. Proof. trivial. Qed.": "another statement was proved",
    "Module Candidate. Axiom t : 1 = 2. End Candidate. Theorem t : True. Proof. trivial. Qed.": "another statement was proved",
}


INDUCTION = "induction n as [|n IH]; simpl; [reflexivity | now rewrite IH]."


@needs_coq
def test_coq_proofs():
    assert check_coq(INDUCTION, STATEMENT) == Verdict(True, "proved")
    assert check_coq(f"Lemma helper : forall n, n + 0 = n. Proof. {INDUCTION} Qed.\nTheorem t : {STATEMENT}. Proof. exact helper. Qed.", STATEMENT, name="t").value is True
    double = "Require Import ZArith Lia.\nOpen Scope Z_scope.\nDefinition double x := x + x."
    assert check_coq("intros; unfold double; lia.", "forall x y : Z, double x + y = y + x + x", double).value is True
    unheard = check_coq("trivial.", "forall n, unheard_of n")
    assert (unheard.value, unheard.cause) == (None, "the statement was rejected")


@needs_coq
def test_coq_axioms_are_named_and_can_be_allowed():
    excluded_middle = ("Require Import Classical.\nTheorem t : forall P : Prop, P \\/ ~ P. Proof. exact classic. Qed.", "forall P : Prop, P \\/ ~ P")
    assert check_coq(*excluded_middle, name="t") == Verdict(False, "the proof rests on axioms", "Classical_Prop.classic")
    assert check_coq(*excluded_middle, name="t", allowed=["Classical_Prop.classic"]).value is True
    same_name = ("Axiom classic : forall P : Prop, P.\nTheorem t : 1 = 2. Proof. apply classic. Qed.", "1 = 2")
    assert check_coq(*same_name, name="t", allowed=["Classical_Prop.classic"]).value is False


@needs_coq
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_coq_script_that_deceives_is_rejected(script):
    v = check_coq(script, STATEMENT)
    assert (v.value, v.cause) == (False, SCRIPTS[script]), v


@needs_coq
@pytest.mark.parametrize("file", FILES)
def test_a_coq_file_that_deceives_is_rejected(file):
    v = check_coq(file, "1 = 2", name="t")
    assert (v.value, v.cause) == (False, FILES[file]), v


@needs_coq
def test_coq_keeps_within_its_limits():
    start = time.monotonic()
    assert check_coq("repeat (assert (0 = 0) by reflexivity).", STATEMENT, limits=Limits(1.)).cause == "timeout" and time.monotonic() - start < 20
    memory = check_coq("Require Import NArith. Definition big := Eval vm_compute in N.to_nat (2^30). Theorem t : True. Proof. exact I. Qed.", "True", name="t", limits=Limits(20., 700))
    assert memory.value is None and memory.cause in ("crash", "timeout"), memory


@needs_coq
def test_a_coq_proof_through_the_registry():
    proof = "```coq\ninduction n as [|n IH]; simpl; [reflexivity | now rewrite IH].\n```"
    assert verify(f"By induction.\n{proof}", STATEMENT, "proof", {"prover": "coq"}).value is True
    assert verify("Admitted. Theorem x : True. Proof. trivial.", STATEMENT, "proof", {"prover": "coq", "timeout": 20}).value is False


# --- confinement

@needs_box
def test_a_confined_program_reaches_nothing(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir(), outside.mkdir()
    run = lambda command: confined(["sh", "-c", command], inside, Limits(5))
    assert run("echo hello > kept; cat kept") == (0, "hello\n") and (inside / "kept").read_text() == "hello\n"
    assert run(f"echo x > {outside}/f")[0] != 0 and run("echo x > /etc/synthlab_was_here")[0] != 0 and not list(outside.iterdir())
    assert [line.split(":")[0].strip() for line in run("tail -n +3 /proc/net/dev")[1].splitlines()] == ["lo"]
    assert run(f"kill -9 {os.getpid()}")[0] != 0


@needs_box
def test_a_confined_program_sees_no_secrets_and_leaves_nobody_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "synthlab_secret")
    assert "synthlab_secret" not in confined(["env"], tmp_path, Limits(5))[1]
    mark = f"61{os.getpid()}"
    start = time.monotonic()
    assert confined(["sh", "-c", f"sleep {mark} & sleep {mark}"], tmp_path, Limits(.5)) == (None, "") and time.monotonic() - start < 5
    deadline = time.monotonic() + 5
    asleep = lambda: [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in _bytes(p)]
    while asleep() and time.monotonic() < deadline: time.sleep(.05)
    assert not asleep()


def _bytes(path):
    try: return path.read_bytes()
    except OSError: return b""


@needs_box
def test_a_box_that_cannot_be_had_is_an_error(tmp_path, monkeypatch):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace'\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ProverUnavailable, match="cannot confine"): confined(["true"], tmp_path, Limits(5))
