"""The project's own rules: one source of metadata, light imports, and imports that point only to lower page numbers."""
import ast
import configparser
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import synthlab

ROOT = Path(__file__).parent.parent


def settings():
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def test_pyproject_agrees_with_settings():
    nbdev = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["nbdev"]
    c = settings()
    assert nbdev["lib_path"] == c["lib_path"] and nbdev["nbs_path"] == c["nbs_path"] and nbdev["tst_flags"] == c["tst_flags"].split()
    assert nbdev["put_version_in_init"] is c.getboolean("put_version_in_init") is False
    assert "project" not in tomllib.loads((ROOT / "pyproject.toml").read_text()), "metadata lives in settings.ini"
    assert synthlab.__version__ == c["version"]


def test_pins_satisfy_the_requirements():
    from packaging.requirements import Requirement
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {re.sub(r"[-_.]+", "-", k).lower(): v for k, v in pins.items()}
    c = settings()
    for text in " ".join(c[k] for k in c if k.endswith("requirements")).split():
        r = Requirement(text)
        name = re.sub(r"[-_.]+", "-", r.name).lower()
        assert name in pins and r.specifier.contains(pins[name]), f"{text}: pinned to {pins.get(name)}"


def fresh_python(code):
    return subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True, cwd="/")


def test_import_is_light():
    heavy = {"torch", "jax", "ipywidgets", "numpy", "pandas", "transformers", "matplotlib"}
    done = fresh_python("import sys, synthlab; print(*[m for m in sys.modules])")
    assert not heavy & set(done.stdout.split())
    took = [int(line.split("|")[1]) for line in done.stderr.splitlines() if line.rsplit("|", 1)[-1].strip() == "synthlab"]
    assert took[0] < 500_000, "microseconds of import time"


def test_every_public_name_resolves():
    assert {name for name in synthlab.__all__ if getattr(synthlab, name, None) is None} == set()


def test_the_command_line_loads_nothing_heavy():
    done = fresh_python("import sys; sys.argv = ['synthlab', '--help']\nfrom synthlab.lab.cli import main\ntry: main()\nexcept SystemExit: pass\nprint(*sys.modules)")
    assert "doctor" in done.stdout and not {"torch", "jax", "pandas", "numpy", "transformers"} & set(done.stdout.split())


def module_numbers():
    numbers = {}
    for page in (ROOT / "nbs").glob("[0-9]*.ipynb"):
        for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
            if m := re.match(r"#\| default_exp (\S+)", "".join(cell["source"])): numbers[f"synthlab.{m[1]}"] = int(page.name[:2])
    return numbers


def test_imports_point_to_lower_pages():
    numbers, wrong = module_numbers(), []
    for module, number in numbers.items():
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            wrong += [f"{module} -> {n}" for n in names if n.startswith("synthlab") and numbers.get(n, 99) >= number]
    assert len(numbers) > 10 and not wrong
