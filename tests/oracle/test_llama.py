"""transformers' LlamaForCausalLM against our low-res path: no image or page budget 0, in PyTorch and exported."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engines.bundle.folder import Bundle
from engines.ort import OrtModel
from tests.checkpoints import write_checkpoint
from tests.geometries import tiny
from tests.oracle.conftest import everything
from tests.oracle.models import clip_features, llama_of
from tests.parity.requests import encode, load, request

RELATIVE = 5e-6  # to the largest logit; float32 sums in another order
VARIANTS = {
    "plain": tiny(),
    "grouped heads": tiny(kv_heads=2),
    "one head for all": tiny(kv_heads=1),
    "biases": tiny(attention_bias=True),
    "tied embeddings": tiny(tied_embeddings=True),
    "another rotary base": tiny(rope_theta=500.0),
    "another epsilon": tiny(rms_eps=1e-2),
    "everything": everything(),
}
PROMPT = [1, 9, 33, 20, 4, 17, 60, 2, 8, 41, 5, 5]


def close(found: np.ndarray, expected: np.ndarray, times: float = 1) -> bool:
    """Whether logits are equal up to rounding, or up to `times` that."""
    return np.abs(found - expected).max() <= times * RELATIVE * np.abs(expected).max()


def assert_equal(model, expected: np.ndarray, ids: list[int], first: int) -> None:
    """`first` tokens at once, the others one by one: logits of every one of them [n, vocab]."""
    decoder = model.decoder(model.no_image(1), len(ids))
    found = [decoder.run(np.array([ids[:first]]))] + [decoder.run(np.array([[token]])) for token in ids[first:]]
    assert len(found) == len(ids) - first + 1
    for step, logits in zip(found, expected[first - 1 :], strict=True):
        assert close(step.logits[0], logits)
        assert step.token[0] == logits.argmax() and not step.cells().any()


@torch.no_grad()
def logits_of(llama, ids: list[int]) -> np.ndarray:
    """Of every token [n, vocab], with transformers' own cache; the same as in one pass."""
    whole = llama(torch.tensor([ids])).logits[0]
    cache, steps = None, []
    for token in ids:
        result = llama(torch.tensor([[token]]), cache=cache, use_cache=True)
        cache = result.cache
        steps.append(result.logits[0, 0])
    assert close(torch.stack(steps).numpy(), whole.numpy())
    return whole.numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference(variant, tmp_path):
    g = VARIANTS[variant]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", g)
    expected = logits_of(llama_of(checkpoint, g), PROMPT)
    assert np.abs(expected).max() > 1
    model = load(checkpoint)
    for first in (1, 7, len(PROMPT)):
        assert_equal(model, expected, PROMPT, first)


def test_exported_graphs(exported):
    checkpoint, bundle, g = exported
    expected = logits_of(llama_of(checkpoint, g), PROMPT)
    model = OrtModel(Bundle(bundle))
    for first in (1, 7, len(PROMPT)):
        assert_equal(model, expected, PROMPT, first)


def test_rows_of_different_length(exported):
    """Prompts of a batch are padded at the end; no row sees its own padding or the other."""
    checkpoint, bundle, g = exported
    llama, rows = llama_of(checkpoint, g), [PROMPT, [1, 50, 3, 12, 7]]
    lengths = np.array([len(row) - 2 for row in rows])
    padded = np.zeros((2, lengths.max()), np.int64)
    for into, row, length in zip(padded, rows, lengths, strict=True):
        into[:length] = row[:length]
    expected = [logits_of(llama, row) for row in rows]
    for model in (load(checkpoint), OrtModel(Bundle(bundle))):
        decoder = model.decoder(model.no_image(2), 20)
        decoder.run(padded, lengths=lengths)
        for last in (2, 1):
            step = decoder.run(np.array([[row[-last]] for row in rows]))
            for found, logits in zip(step.logits, expected, strict=True):
                assert close(found, logits[-last])


@torch.no_grad()
def test_an_image_without_pages_is_llava(exported):
    """CLIP, the projector and Llama of transformers, put together as LLaVA does: what a page budget of 0 leaves."""
    checkpoint, bundle, g = exported
    tiles, ids, begin = request(g, seed=11)
    llama, forced = llama_of(checkpoint, g), [7, 30, 2]
    features = clip_features(checkpoint, g, torch.from_numpy(tiles[:1]))[0].float()
    row = torch.from_numpy(np.concatenate((ids[0], forced)))
    words = llama.get_input_embeddings()(row.clamp(min=0))
    embedded = torch.where((row < 0)[:, None], features[(-1 - row).clamp(min=0)], words)
    expected = llama(inputs_embeds=embedded[None]).logits[0, ids.shape[1] - 1 :].numpy()
    for model in (load(checkpoint), OrtModel(Bundle(bundle))):
        decoder = model.decoder(encode(model, tiles, begin), len(row))
        decoder.run(ids[:, :-1])
        for token, logits in zip([int(ids[0, -1]), *forced], expected, strict=True):
            step = decoder.run(np.array([[token]]), 0)
            assert close(step.logits[0], logits)
        pages = model.decoder(encode(model, tiles, begin), len(row))
        pages.run(ids[:, :-1])
        assert not close(pages.run(ids[:, -1:], g.pages).logits[0], expected[0], times=1000)
