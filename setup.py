"""What setup.cfg cannot say: the scripts travel inside the package."""

from setuptools import find_packages, setup


setup(
    packages=[*find_packages(include=["hf_detrkd*"]), "hf_detrkd.scripts"],
    package_dir={"hf_detrkd.scripts": "scripts"},
)
