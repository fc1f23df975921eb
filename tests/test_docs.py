"""What the documentation names exists, and what it shows is what happens."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console

from export.build import print_sizes
from export.options import parse_arguments
from tests.paths import ROOT

README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "export/default_model/README.md", *sorted((ROOT / "docs").glob("*.md"))]
# As the public checkpoint has them, senfu/llava-v1.5-7b-flexattn on the Hub.
PUBLIC = {
    "model_type": "llava", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tokenizer_model_max_length": 2048, "bos_token_id": 1,
    "eos_token_id": 2, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2,
    "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad",
    "extra": {"highres_size": "1008", "lowres_size": "336", "threshold": "48", "warmup": "10", "zoom_ratio": "3"},
}  # fmt: skip


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_commands_exist(page):
    """Paths, and modules that are run; the changelog may name what is gone."""
    text = page.read_text()
    rooms = "export|engines|runtime|plugins|tests|docs|examples|scripts"
    paths = re.findall(rf"(?<![\w/.])(?:{rooms})/[\w/<>.-]*[\w>]", text) if page.name != "CHANGELOG.md" else []
    missing = [path for path in paths if not (ROOT / path.replace("<op>", "select_pages")).exists()]
    assert not missing, "<op> stands for any"
    for module in re.findall(rf"python3? -m ((?:{rooms})[\w.]*)", text):
        assert find_spec(module), module


def test_the_readme_can_be_read_at_once():
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    for script in (line for line in lines if line.startswith("bash scripts/")):
        assert (ROOT / script.split()[1]).is_file()


def test_the_program_in_the_readme(default_bundle, monkeypatch, capsys):
    (program,) = re.findall(r"```python\n(.+?)```", README.read_text(), re.DOTALL)
    assert '"build/default-fp16"' in program
    monkeypatch.chdir(ROOT)
    exec(program.replace("build/default-fp16", str(default_bundle("fp16"))), {})
    assert capsys.readouterr().out == "30\n"


@pytest.mark.parametrize(("page", "fits"), [("building.md", [False, True]), ("small-boards.md", [True, False])])
def test_the_plans_are_what_the_command_prints(page, fits, tmp_path, capsys):
    """On the configuration of the public checkpoint, which is all that a plan reads."""
    text = (ROOT / "docs" / page).read_text()
    plans = re.findall(r"^\$ python export/build\.py (.+?)\n(.+?)```", text, re.DOTALL | re.MULTILINE)
    model = tmp_path / "llava-v1.5-7b-flexattn"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(PUBLIC))
    found = []
    for command, shown in plans:
        arguments = command.replace("checkpoints/llava-v1.5-7b-flexattn", str(model)).split()
        found.append(print_sizes(parse_arguments(arguments), Console()))
        assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown.splitlines()
        assert found[-1] == ("does not fit" not in shown)
    assert found == fits
