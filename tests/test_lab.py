"""The notebooks in a real JupyterLab, and the explorer and the report in a real browser. Needs Chromium; skipped with a reason without it."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "nbs").glob("*.ipynb"))
FAST = {"00_core", "81_widgets", "84_board"}
SKIPPED = ("notest", "slow", "gpu", "eval: false")
READY = """() => { const c = window.jupyterapp?.shell.currentWidget?.sessionContext;
    return c && c.isReady && c.session?.kernel?.status === 'idle' && c.session.kernel.connectionStatus === 'connected' }"""
STATE = """() => { const p = window.jupyterapp.shell.currentWidget, cells = [...p.content.model.cells].filter(c => c.type === 'code' && c.sharedModel.source.trim());
    return { kernel: p.sessionContext.session?.kernel?.status, cells: cells.map(c => ({ n: c.executionCount, running: c.executionState === 'running',
        error: c.outputs.toJSON().filter(o => o.output_type === 'error').map(o => `${o.ename}: ${o.evalue}`).join() })) } }"""

CELLS = "() => window.jupyterapp.shell.currentWidget.content.model.cells.length"


def flagged(cell):
    directives = [line[2:].strip() for line in cell.source.splitlines() if line.startswith("#|")]
    return any(re.split(r"[\s]", d)[0] == f or d == f for d in directives for f in SKIPPED)


def runnable(path):
    "A notebook without outputs and without the cells that a run of the page leaves out."
    nb = nbformat.read(path, as_version=4)
    nb.cells = [c for c in nb.cells if c.cell_type != "code" or not flagged(c)]
    for c in nb.cells:
        if c.cell_type == "code": c.outputs, c.execution_count = [], None
    return nb


def open_notebook(page, lab, nb, name):
    "Put a notebook where JupyterLab serves it, open it and wait for its kernel."
    nbformat.write(nb, lab.root / name)
    page.goto(f"{lab.base}/lab/tree/{name}?token={lab.token}&reset")
    page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)").wait_for(timeout=60_000)
    page.wait_for_function(READY, timeout=60_000)


def run_all(page, seconds=60):
    "Run all cells and wait for the last one. The state is read from the model: JupyterLab draws only the cells in sight."
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    for _ in range(int(seconds * 4)):
        state = page.evaluate(STATE)
        if any(c["error"] for c in state["cells"]) or all(c["n"] for c in state["cells"]) and state["kernel"] == "idle": break
        page.wait_for_timeout(250)
    assert [c["error"] for c in state["cells"] if c["error"]] == []
    assert all(c["n"] for c in state["cells"]), f"{sum(not c['n'] for c in state['cells'])} cells did not finish in {seconds} s"


def end_kernel(page):
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")

def wear(page, theme):
    "Change JupyterLab's theme and wait until the page wears it."
    page.evaluate("theme => { window.jupyterapp.commands.execute('apputils:change-theme', { theme: `JupyterLab ${theme}` }) }", theme)
    page.wait_for_selector(f"body[data-jp-theme-light={'true' if theme == 'Light' else 'false'}]", state="attached")


def picture_in_the_dark(page, path):
    wear(page, "Dark")
    page.wait_for_timeout(500)
    page.screenshot(path=path)
    wear(page, "Light")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem, marks=() if p.stem in FAST else pytest.mark.slow) for p in PAGES])
def test_a_page_runs_top_to_bottom_in_jupyterlab(lab, chromium, watch, path):
    page = watch.follow(chromium.new_page(), lab.base)
    shutil.copytree(ROOT / "nbs/results", lab.root / "results", dirs_exist_ok=True)  # saved tables that pages show
    try:
        open_notebook(page, lab, runnable(path), path.name)
        run_all(page, 240)
        end_kernel(page)
        assert not watch.outside
    finally: page.close()


def invented_notebook(lab, page, module, show):
    "A notebook that shows a widget on the invented tasks of its page."
    setup = [c.source for c in runnable(ROOT / "nbs" / f"{page}.ipynb").cells if "#| testsetup" in c.source]
    (lab.root / f"invented_{page}.py").write_text("\n".join(setup))
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in [f"from {module} import *\nfrom invented_{page} import *", show]])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nb


EXPLORER = "groups, references, answers, verdicts, tok = demo_run(n=120, G=8)\nRolloutExplorer(groups, references, tok, answers, verdicts)"


@pytest.mark.timeout(180)
def test_a_rubric_is_edited_and_scored_again(lab, chromium, watch, tmp_path):
    from playwright.sync_api import expect
    page = watch.follow(chromium.new_page(), lab.base)
    try:
        open_notebook(page, lab, invented_notebook(lab, "84_board", "synthlab.lab.widgets", "from synthlab.lab.widgets import RubricBoard\nboards, judge = demo_boards()\nRubricBoard(boards, judge)"), "board.ipynb")
        run_all(page)
        live = page.locator(".sl-live")
        scores = live.locator("tfoot td b")
        expect(scores).to_have_text(["1.00", "0.00", "0.67", "0.67"], timeout=20_000)
        live.get_by_label("Weight of criterion 2").fill("3")
        live.get_by_label("Weight of criterion 2").press("Enter")
        expect(scores).to_have_text(["1.00", "0.00", "0.40", "0.80"])
        expect(live.get_by_label("Weight of criterion 2")).to_be_focused()
        page.screenshot(path=tmp_path / "board.png")

        live.get_by_label("Criterion 1", exact=True).fill("The answer takes 2 seconds.")
        live.get_by_label("Criterion 1", exact=True).press("Enter")
        expect(live.locator("tbody tr").first.locator("td.sl-wrong")).to_have_count(4)
        expect(live.locator("tbody tr").first).to_contain_text("flat")
        live.get_by_role("button", name="Undo").click()
        expect(live.get_by_label("Criterion 1", exact=True)).to_have_value("The answer says that there are 36 at first.")
        live.get_by_label("Add a criterion").fill("<img src=x onerror=alert(1)> seconds")
        live.get_by_label("Add a criterion").press("Enter")
        expect(live.locator("tbody tr")).to_have_count(5)
        assert live.locator("img").count() == 0
        live.get_by_label("Weight of criterion 1").fill("heavy")
        live.get_by_label("Weight of criterion 1").press("Enter")
        expect(live.locator("[role=alert]")).to_contain_text("a weight is a number")
        live.get_by_role("button", name="Next").click()
        expect(live.locator(".sl-status")).to_have_text("2 of 3")
        page.screenshot(path=tmp_path / "board_end.png")
        end_kernel(page)
        watch.clean()
    finally: page.close()


TRAINED = """
import time
from synthlab.training.sft import fit, lay_out, likelihood_loss, next_token
def batches(step, model):
    time.sleep(.05)
    return lay_out([[next_token(np.arange(9), np.full(9, .1))]], 64), {"reward": step / 100, "<b>": 1.}
done = fit(random_params(Config("llama", 40, 32, 1, 4, 2, 8, 48, 1e-5, 512, True), 0), likelihood_loss, batches, 10_000, folder="watched", progress="")
print("ended after", done.steps)
"""


@pytest.mark.timeout(300)
def test_a_run_is_watched_and_stopped_while_its_cell_is_running(lab, chromium, watch, tmp_path):
    from playwright.sync_api import expect
    page = watch.follow(chromium.new_page(), lab.base)
    try:
        nb = invented_notebook(lab, "85_monitor", "synthlab.lab.widgets", "from synthlab.lab.widgets import RunMonitor\nRunMonitor('watched', every=.3)")
        nb.cells.append(nbformat.v4.new_code_cell(TRAINED))
        open_notebook(page, lab, nb, "monitor.ipynb")
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        live = page.locator(".sl-live")
        expect(live.locator(".sl-state")).to_have_text("running", timeout=120_000)
        reward = live.locator("figure", has_text="Reward").locator("path").last
        expect(reward).to_be_visible(timeout=60_000)
        numbers = live.locator("details[data-key=numbers]")
        numbers.locator("summary").click()
        before = reward.get_attribute("d")
        expect(reward).not_to_have_attribute("d", before, timeout=20_000)
        expect(numbers.locator("td", has_text="grad_norm")).to_be_visible()  # what a reader has opened stays open
        expect(numbers.locator("summary")).to_be_focused()
        # the kernel's own status says idle for a moment after each message of the widget, which a subshell answers
        assert [c["running"] for c in page.evaluate(STATE)["cells"]] == [False, False, True], "the run is going on in a cell"
        page.screenshot(path=tmp_path / "running.png")

        live.get_by_role("button", name="Stop").click()
        expect(live.locator(".sl-state")).to_have_text("stopped", timeout=30_000)
        expect(live).to_contain_text("Stopped on request: call it again with the same folder")
        expect(live.get_by_role("button", name="Stop")).to_have_attribute("aria-disabled", "true")
        expect(live.get_by_role("button", name="Look again")).to_be_visible()
        expect(page.locator(".jp-OutputArea-output", has_text="ended after")).to_be_visible(timeout=20_000)
        state = page.evaluate(STATE)
        assert not any(c["error"] for c in state["cells"])
        assert not (lab.root / "watched" / "stop").exists() and (lab.root / "watched" / "checkpoint.safetensors").exists()

        picture_in_the_dark(page, tmp_path / "stopped_dark.png")
        end_kernel(page)
        watch.clean()
    finally: page.close()


@pytest.mark.timeout(180)
def test_the_explorer_is_clicked_through(lab, chromium, watch, tmp_path):
    from playwright.sync_api import expect
    page = watch.follow(chromium.new_page(), lab.base)
    try:
        open_notebook(page, lab, invented_notebook(lab, "81_widgets", "synthlab.lab.widgets", EXPLORER), "explorer.ipynb")
        run_all(page)
        live = page.locator(".sl-live")
        status, cards, button = live.locator(".sl-status"), live.locator("section[aria-label=Rollouts] .sl-card"), lambda name: live.get_by_role("button", name=name)
        expect(status).to_have_text("1 of 120", timeout=20_000)
        expect(live.locator(".sl-prompt")).to_contain_text("12 books")
        expect(cards).to_have_count(8)

        button("Next").click()
        expect(status).to_have_text("2 of 120")
        expect(live.locator(".sl-prompt")).to_contain_text("19 books")
        expect(cards.filter(has_text="unknown: no answer found")).to_have_count(2)
        live.locator("select").select_option("2")
        expect(status).to_have_text("3 of 120")
        expect(live.locator(".sl-ref")).to_contain_text("differs from the majority")
        page.screenshot(path=tmp_path / "side.png")

        button("Token log-probs").click()
        expect(button("Token log-probs")).to_have_attribute("aria-pressed", "true")
        assert cards.first.locator(".sl-text span[title]").count() > 5
        expect(live.locator(".sl-legend")).to_be_visible()
        page.screenshot(path=tmp_path / "shaded.png")
        button("List").click()
        expect(live.locator(".sl-cards.sl-list[aria-label=Rollouts]")).to_be_visible()
        button("Side by side").click()

        button("All wrong").click()
        expect(status).to_have_text("1 of 30")
        assert live.locator("select option").count() == 30
        expect(cards.first).to_contain_text("<script>document.title='owned'</script><img src=x onerror")
        assert live.locator("script, img").count() == 0
        page.keyboard.press("ArrowRight")
        expect(status).to_have_text("2 of 30")
        expect(button("All wrong")).to_be_focused()

        n_cells = page.evaluate(CELLS)
        page.keyboard.press("b")  # in JupyterLab's command mode this would insert a cell
        search = live.get_by_role("searchbox")
        search.click()
        search.press_sequentially("holds 33", delay=40)
        expect(status).to_have_text(f"1 of {sum('33' in f'{12 + 7 * t} {5 + 3 * t} {17 + 10 * t}' for t in range(3, 120, 4))}")  # of those all wrong
        expect(search).to_be_focused()
        expect(search).to_have_value("holds 33")
        search.fill("no such task")
        expect(live.locator(".sl-empty")).to_be_visible()
        search.fill("")
        button("All 120").click()
        expect(status).to_contain_text("of 120")
        assert page.evaluate(CELLS) == n_cells and "owned" not in page.title()

        picture_in_the_dark(page, tmp_path / "dark.png")
        end_kernel(page)
        watch.clean()
    finally: page.close()


REPORT = """
import sys
from synthlab.core import *; from synthlab.lab.report import *
exec(compile(open(sys.argv[1]).read(), 'setup', 'exec'))
parts = demo_parts(n=24, G=8, text='Words that go on. ' * 60 + 'x' * 300 + ' The answer is {s}. <script>document.title = 1</script><img src=http://x.test/i.png>')
parts['table']['a_column_with_quite_a_long_name'] = 'and a long text in it'
write_report(sys.argv[2], 'Shelves of books, counted by a stub', **parts)
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    "A report with long texts, made by another process, as the command line does."
    folder = tmp_path_factory.mktemp("report")
    (folder / "setup.py").write_text("\n".join(c.source for c in runnable(ROOT / "nbs/82_report.ipynb").cells if "#| testsetup" in c.source))
    subprocess.run([sys.executable, "-c", REPORT, folder / "setup.py", folder / "report.html"], check=True, cwd=ROOT)
    return folder / "report.html"


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (1280, "dark"), (400, "light")])
def test_the_report_in_a_browser(chromium, watch, tmp_path, report, width, scheme):
    page = watch.follow(chromium.new_page(), report.as_uri())
    try:
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.goto(report.as_uri())
        assert page.title() == "Shelves of books, counted by a stub"
        assert page.locator(".group").count() == 10 and page.locator(".group .sl-card").count() == 10 * 9
        assert page.evaluate("document.querySelector('figure img').naturalWidth") > 300
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"the page is {wide} px wider than the window"
        page.screenshot(path=tmp_path / f"report_{width}_{scheme}.png")
        page.locator(".group").first.scroll_into_view_if_needed()
        page.screenshot(path=tmp_path / f"report_{width}_{scheme}_groups.png")
        watch.clean()
    finally: page.close()


def test_no_widget_state_is_committed():
    for path in PAGES:
        nb = nbformat.read(path, as_version=4)
        assert "widgets" not in nb.metadata, f"{path.name} holds saved widget state, which nbdev-clean keeps: delete metadata.widgets"
        kinds = {k for c in nb.cells if c.cell_type == "code" for o in c.outputs for k in o.get("data", {})}
        assert not any("widget" in k for k in kinds), f"{path.name} holds the output of a live widget; run the page with nbdev-test --save"
