"""Everything about the package is in settings.ini; this file only hands it to setuptools."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]


def words(key):
    return cfg.get(key, "").split()


extras = {name: words(f"{name}_requirements") for name in ("dicom", "tune", "scale", "kaggle", "lab", "docs")}
# whoever works on the course reads DICOM and NIfTI, searches, opens the lab and renders the site;
# Ray stays a choice, it is large
extras["dev"] = sorted({
    *words("dev_requirements"),
    *(w for name in ("dicom", "tune", "lab", "docs") for w in extras[name]),
})
readme = here / "README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    classifiers=[
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
    packages=find_packages(include=["cxr_course", "cxr_course.*"]),
    package_data={"": ["py.typed", "*.j2"]},
    include_package_data=False,
    python_requires=f">={cfg['min_python']}",
    install_requires=words("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": words("console_scripts"),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
