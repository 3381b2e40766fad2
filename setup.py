"""What setup.cfg cannot say: recipes and accelerate configurations travel inside the package."""

from setuptools import find_packages, setup


DATA = {f"hf_detrkd.scripts.{name}": f"scripts/{name}" for name in ("recipes", "accelerate_configs")}

setup(packages=[*find_packages(include=["hf_detrkd*"]), *DATA], package_dir=DATA)
