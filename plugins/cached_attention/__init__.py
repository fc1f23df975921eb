"""flex::CachedAttention: rotary, KV-cache update, causal attention and the head-summed map; no pages.

Used by the layers up to and including the start layer. H query heads share Hkv key/value heads (H = Hkv * group);
hd = head_dim; L = cache capacity in tokens; T = model dtype (float32, float16 or bfloat16).

| input | shape | dtype | meaning |
|---|---|---|---|
| query | [B, S, H*hd] | T | projected, before rotary, heads side by side |
| key, value | [B, S, Hkv*hd] | T | the same for the new keys and values |
| past_key, past_value | [B, Hkv, L, hd] | T | the cache; the places at `positions` are written |
| positions | [B, S] | int64 | of the new tokens, consecutive in each row; the first is the number of tokens cached |
| cos, sin | [context, hd/2] | float32 | rotary tables by position (first half; the second half repeats it) |
| image_begin | [B] | int64 | position of the first of G*G image tokens, all within L; 0 when there is no image |

| output | shape | dtype | meaning |
|---|---|---|---|
| context | [B, S, H*hd] | T | attention output, before o_proj |
| present_key, present_value | [B, Hkv, L, hd] | T | the cache after the update; bind it to the same buffer as past_* |
| map | [B, G, G] | float32 | softmax weights of the LAST query on the G*G image tokens, summed over heads |

Attributes: `heads` (H), `kv_heads` (Hkv), `head_dim` (hd), `grid` (G), and `int8_cache` (0 where a node lacks it). A
token sees the cache up to its own position, so rows of different length may be padded at their end: what padding writes
is overwritten before it is seen.

With `int8_cache` = 1 the cache takes 8 bits a value: past_* and present_* are int8, and two inputs and two outputs,
which share their buffers, follow all others:

| past_key_scale, past_value_scale | [B, Hkv, L] | float32 | the steps that a token's key and value are counted in |
| present_key_scale, present_value_scale | [B, Hkv, L] | float32 | those after the update |

Each head of each token has a step of its own: its largest magnitude divided by STEPS (at least LEAST). A value is
stored as the nearest whole number of steps, ties to even; what is rounded is the value in T, and the key after the
rotation in float32. The steps stay float32: in T they would be subnormal where numbers are small, and 4 bytes for hd
values are little. What is stored is what every query reads, the new tokens' own keys and values, too: it makes no
difference whether a prompt comes at once or token by token. Scores, and sums over values, are float32: a score is the
product of the query and the int8 key times the step of the key, a weight is multiplied by the step of its value before
it meets the int8 value. (The kernels give a prompt's queries keys and values that are rounded to T, which tensor cores
multiply; the last query's are not.)

Faces: `reference.py` (PyTorch), `onnx_body.py` (ONNX function for ONNX Runtime), `onnx_static.py` (for TensorRT without
plugins). `kernel.py` and `int8_kernel.py` (Triton), `launch.py` (its launches, as a TensorRT plugin asks for them).
"""

STEPS = 127  # of an int8 number, on each side of zero: symmetric, -128 is not used
LEAST = 1e-30  # taken as the largest magnitude of a token that is all zeros, whose step would be 0
MASKED = -60000.0  # finite, within float16: its softmax weight is exactly 0, and a fully masked row stays finite
UNSEEN = -3e38  # added to a float32 score, however large, in place of MASKED
