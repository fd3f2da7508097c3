"""Packaging: everything is read from settings.ini, the single source of metadata."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(root / "settings.ini", encoding="utf-8")
c = ini["DEFAULT"]
extras = {name: c[f"{name}_requirements"].split() for name in ("api", "checks", "eval", "formal", "lab", "lexical", "trl", "dev")}
extras["dev"] += extras["api"] + extras["checks"] + extras["formal"] + extras["lab"] + extras["trl"]

setup(name=c["lib_name"], version=c["version"], description=c["description"], author=c["author"], license=c["license"],
      keywords=c["keywords"].split(), packages=find_packages(include=[c["lib_path"], f"{c['lib_path']}.*"]),
      python_requires=f">={c['min_python']}", install_requires=c["requirements"].split(), extras_require=extras,
      entry_points={"console_scripts": ["synthlab=synthlab.lab.cli:main"], "nbdev": ["synthlab=synthlab._modidx:d"]},
      long_description=(root / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown")
