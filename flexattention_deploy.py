"""What is installed: whether the packages Python finds are this project's, and whether it has what they need.

The packages have everyday names. An app with a package `engines` of its own would otherwise end in the middle of an
import, with a message about a module that nobody has heard of.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGES = ("export", "runtime", "engines", "plugins")
_HERE = Path(__file__).resolve().parent
EXTRAS = {  # modules by the extra of pyproject.toml that brings them
    "export": ("torch", "onnx", "onnx_ir", "onnxscript", "rich", "sentencepiece", "google.protobuf", "huggingface_hub"),
    "train": ("safetensors",),
    "serve": ("starlette", "uvicorn", "prometheus_client"),
    "chat": ("prompt_toolkit",),
    "evaluate": ("scipy", "rich"),
    "ray": ("ray", "fastapi", "fsspec"),  # fastapi: of ray[serve], which ray alone lacks
}


def require_own(*packages: str) -> None:
    """ImportError when one of these packages, as Python finds it, is somebody else's."""
    for package in packages:
        found, own = folder_of(package), _HERE / package
        if found is not None and found != own:
            raise ImportError(
                f"the package {package!r} that Python finds is not flexattention-deploy's: {found}\n"
                f"  expected: {own}\n"
                f"  fix: rename the other one; or, if it only lies beside your script, start it as python -P SCRIPT, "
                f"which does not look there (python -m flexattention_deploy lists all of these packages)",
                name=package,
                path=str(found),
            )


def require_extra(extra: str) -> None:
    """ImportError when a module of an extra is missing; where a command of this project is being started, the end of
    the process instead, with the same message and no traceback."""
    missing = [module for module in EXTRAS[extra] if not _is_there(module)]
    if not missing:
        return
    message = (
        f"{', '.join(missing)}: not installed\n  expected: the packages of the extra {extra!r}\n"
        f"  fix: pip install '.[{extra}]' in this project's folder"
    )
    if sys.argv[0] == "-m" or _HERE in Path(sys.argv[0]).resolve().parents:  # python -m export.build, export/build.py
        sys.exit(f"error: {message}")
    raise ImportError(message, name=missing[0])


def folder_of(package: str) -> Path | None:
    """Where Python would import a package from; None if there is none. It is not imported."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # somebody put something into sys.modules that says nothing about itself
        return None
    places = [*(spec.submodule_search_locations or ()), spec.origin] if spec else []
    return Path(places[0]).resolve() if places and places[0] else None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # no package around it; None in sys.modules
        return False


def main() -> int:
    """Print where each package comes from; 1 if one is not this project's."""
    status = 0
    for package in PACKAGES:
        found, own = folder_of(package), _HERE / package
        status |= found != own
        print(f"{package}: {found}" + ("" if found == own else f", not this project's: {own}"))
    return status


if __name__ == "__main__":
    sys.exit(main())
