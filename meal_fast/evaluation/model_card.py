"""The card of an exported policy: what it is, how it is asked, and what was measured of it.

It names nothing of the machine: of a path that is no hub name the last part alone.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from meal_fast import __version__
from meal_fast.common import printable
from meal_fast.config.config import Config
from meal_fast.config.run_dir import PREFERENCE_NET
from meal_fast.data.assets.licences import Origin, origin
from meal_fast.data.preferences import Preference, preference_text
from meal_fast.models.export import base_of, is_hub_name

from .html_page import TEMPLATES
from .stored import read_evaluation
from .tables import by_weight, said_once
from .verdict import scope, verdict

Kind = Literal["hub", "adapter", "gguf"]
_ASK = "How do tides work?"


def model_card(
    run: Path,
    config: Config,
    kind: Kind,
    *,
    title: str,
    at: Preference | None = None,
    base: str = "",
    unfinished: str = "",
) -> str:
    """Give the card's text, Markdown behind the YAML that a hub reads.

    title: of the export, its folder's or file's name.
    at: the only preference that it serves, where it serves one.
    base: by which name the base model is loaded; by default its own.
    unfinished: how far the run is, where it can be resumed.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Markdown, not HTML: what it must not break is a line, and a table's row. What a run's folder
    # named, not we, comes here as `_plain` or `_code` text.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        finalize=lambda value: _cell(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    evaluated = (run / "evaluation.json").is_file()
    result = read_evaluation(run) if evaluated else {}
    known = base_of(config.policy.path)
    known = known._replace(hub=base or known.hub)
    title = _one_line(title)
    table = []
    if evaluated:
        head, rows = by_weight(result)
        table = [head, ["---"] * len(head), *said_once(rows)]
    between = " and ".join(config.names) if len(config.names) == 2 else ", ".join(config.names)
    warnings = [f"The run is not finished: {unfinished}."] if unfinished else []
    what = f"One model, steered between {between} by a preference *w* said with each request."
    if at is not None:
        one = _mapping(config.names, at)
        what = f"What the recipe {config.recipe} serves at {one}, between {between}."
        warnings.append(f"The measures are of the whole run; this model is what serves {one}.")
    text = environment.get_template("card.md.j2").render(
        title=_plain(title),
        licence=known.licence or "other",
        base_model=known.hub,
        library={"hub": "transformers", "adapter": "peft", "gguf": ""}[kind],
        what=what,
        warnings=warnings,
        how=_how(config, kind, at),
        examples=[(k, Block(v)) for k, v in _examples(config, kind, title, known, at)],
        said="" if at is not None else _said(config),
        grid=_grid(config),
        objectives=[(o.partition("=")[0], _source(o.partition("=")[2])) for o in config.objectives],
        verdict=verdict(result) if evaluated else [],
        front=(run / "front.png").is_file(),
        scope=scope(result) if evaluated else "",
        table=table,
        marks=_marks(result),
        training=_training(config, known),
        limits=_limits(run, config, kind, at),
        licences=list(_licences(config, known)),
        version=__version__,
    )
    return re.sub(r"\n{3,}", "\n\n", text)


class Block(str):
    """Lines of our own, for between fences."""


def _cell(text: str) -> str:
    """Keep a value within its line and its cell."""
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


def _plain(text: str) -> str:
    """Write a name as Markdown that shows it as it is: no link, no tag, no emphasis, no fence."""
    shown = re.sub(r"([\\`*\[\]<>!#~])", r"\\\1", _one_line(text))
    return shown.replace("&", "&amp;").replace("://", ":\\//")


def _code(text: str) -> str:
    """Write a name as a span of code, which nothing in it ends."""
    return f"`{_one_line(text).replace('`', chr(0x2019))}`"


def base_name(config: Config) -> str:
    """Name the model that was trained: its hub's name where it has one, else its folder's."""
    base = base_of(config.policy.path)
    return base.hub or base.about


def _source(source: str) -> str:
    """Tell what scores an objective or asks, without the folders that lead to it."""
    known = origin(source)
    name, mark, keys = source.partition("?")
    if not is_hub_name(name) or Path(name).suffix in (".jsonl", ".txt"):
        name = Path(name).name
    kept = [k for k in keys.split("&") if k and not k.startswith(("path=", "device="))]
    said = _code(f"{name}{mark if kept else ''}{'&'.join(kept)}")
    return f"{said}: {known.about}" if known else said


def _mapping(names: Sequence[str], w: Preference) -> str:
    return "{" + ", ".join(f'"{n}": {x:.6g}' for n, x in zip(names, w, strict=True)) + "}"


def _example(config: Config) -> Preference:
    """Give a preference that leans to the first objective."""
    k = len(config.names)
    return (0.8, *[0.2 / (k - 1)] * (k - 1)) if k != 2 else (0.8, 0.2)


def _said(config: Config) -> str:
    style = config.policy.preference_text
    if style in ("none", "scores"):
        return ""
    return preference_text(_example(config), config.names, style)


def _grid(config: Config) -> str:
    points = config.preference.grid
    return f" Training drew them from a lattice of {points} values a side." if points else ""


def _how(config: Config, kind: Kind, at: Preference | None) -> str:
    if at is not None:
        return "It reads none: it is what the run serves at that preference. Ask it as any model."
    given = {
        "hub": "The chat template takes `preference`, a number for each objective",
        "adapter": "The chat template beside the adapter takes `preference`, a number for each "
        "objective",
        "gguf": "The chat template in the file takes `preference`, a number for each objective, "
        "as `chat_template_kwargs` of a request",
    }[kind]
    return f"{given}; leave it out, and none is said."


def _examples(
    config: Config, kind: Kind, title: str, base: Origin, at: Preference | None
) -> Iterator[tuple[str, str]]:
    w = _mapping(config.names, _example(config))
    said = "" if at is not None else f", preference={w}"
    body = '{"messages": [{"role": "user", "content": "' + _ASK + '"}]'
    if at is None:
        body += f',\n  "chat_template_kwargs": {{"preference": {w}}}'
    post = (
        "curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d '{body}}}'"
    )
    if kind == "gguf":
        yield "sh", f"llama-server -m {shlex.quote(title)} --jinja    # llama.cpp's server"
        yield "sh", post
        return
    load = "model = AutoModelForCausalLM.from_pretrained(name)"
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if kind == "adapter":
        trained = base.hub or base.about
        note = "" if base.hub else "  # the model that was trained: its folder"
        load = (
            f"model = AutoModelForCausalLM.from_pretrained({_literal(trained)}){note}\n"
            "model = PeftModel.from_pretrained(model, name)"
        )
        imports = f"from peft import PeftModel\n{imports}"
    python = (
        f"{imports}\n\nname = {_literal(title)}  # this folder; OWNER/NAME where it is published\n"
        f"tokenizer = AutoTokenizer.from_pretrained(name)\n{load}\n"
        f'messages = [{{"role": "user", "content": "{_ASK}"}}]\n'
        f"inputs = tokenizer.apply_chat_template(messages{said},\n"
        '    add_generation_prompt=True, return_dict=True, return_tensors="pt")\n'
        "answer = model.generate(**inputs, max_new_tokens=64)\n"
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], '
        "skip_special_tokens=True))"
    )
    yield "python", python
    if at is None:
        server = post.replace("8080", "8000")
        yield "sh", f"# servers that apply the template, vLLM among them\n{server}"


def _literal(text: str) -> str:
    """Write a text as Python does, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _marks(result: dict[str, Any]) -> str:
    if not result or not result["settings"].get("marks"):
        return ""
    return "Marks are counted by rules on the words of an answer; they are no reward."


def _training(config: Config, base: Origin) -> list[tuple[str, str]]:
    per_step = config.meta.tasks * config.meta.n_inner
    rows = [
        ("base model", _plain(base.about) + f" ({base.hub})" * (base.hub not in ("", base.about))),
        ("recipe", f"{config.recipe}, {config.policy.tuning}"),
        ("updates", f"{config.meta.steps} meta-steps of {per_step} updates"),
        ("prompts and answers", "; ".join(map(_source, _asked(config)))),
        ("answers", f"at most {config.rollout.max_new_tokens} tokens, temperature "
         f"{config.rollout.temperature:g}"),
        ("seed", str(config.seed)),
    ]  # fmt: skip
    if config.warmup.steps:
        rows.insert(2, ("supervised warm start", f"{config.warmup.steps} steps"))
    return rows


def _limits(run: Path, config: Config, kind: Kind, at: Preference | None) -> list[str]:
    limits = [
        "What was trained towards is the rewards above, not the words that name them: a reward "
        "model can be wrong, and a policy finds where.",
        f"Training saw single turns with answers of at most {config.rollout.max_new_tokens} "
        "tokens; longer answers and later turns follow the preference less surely.",
    ]
    if at is None:
        limits.append(
            "A preference is text. The chat template puts out one that stands in a message; that "
            "control tokens there are not live is up to the program that applies it: in "
            "transformers, sanitize_control_tokens=True."
        )
    sources = [o.partition("=") for o in config.objectives]
    complied = [n for n, _, s in sources if s.partition("?")[0] == "packaged:complied"]
    if complied:
        limits.insert(
            0,
            f"{complied[0]} means that the answer does what was asked, harmful requests "
            "included: with its weight high the model complies more readily than its base. A "
            "research model; do not deploy it.",
        )
    if kind == "adapter" and origin(config.policy.path):
        limits.append(
            "The factors belong to weights that were read back from 4 bits; what they do on the "
            "hub's own has not been measured."
        )
    if (run / PREFERENCE_NET).is_file():
        limits.append("The run's preference-weight-net is not part of this export.")
    return limits


def _asked(config: Config) -> list[str]:
    """List what the policy was trained on: prompts and answers."""
    sources = [config.prompts.train, config.prompts.benign, config.ric.data]
    if config.warmup.steps:
        answers = [entry.partition("=")[2] for entry in config.warmup.answers]
        sources += [config.warmup.prompts, config.warmup.benign, *answers]
    own = ("own", "world")
    return list(dict.fromkeys(s for s in sources if s and s.partition(":")[0] not in own))


def _licences(config: Config, base: Origin) -> Iterator[tuple[str, str]]:
    unknown = "not known here; look it up where it comes from"
    yield f"base model, {_plain(base.about)}", base.licence or unknown
    scorers = [o.partition("=")[2] for o in config.objectives if "=world:" not in o]
    for source in dict.fromkeys([*scorers, *_asked(config)]):
        known = origin(source)
        name = _source(source) if known is None else _code(source)
        yield name, unknown if known is None else known.licence or known.about
