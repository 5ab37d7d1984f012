"""Serving's step: new tokens of many sequences, in one flat batch, over a cache of pages.

A row is what is new of one sequence: one token where it decodes, several where drafts are verified, many of a prompt.
Rows lie one behind the other without padding between them, so that one program reads prompts and decodes at once. The
MTP layer has its pages behind those of the main layers, in the same stack and under the same page table.

Pages in int8 or float8_e4m3fn have a scale for each layer's keys and values of each head, fixed when they are made
(`infer.calibrate` measures them): stored is x / scale, rounded to nearest even and saturated; what is read is computed
with as it was stored, of this step's own tokens too.

Axes: N new tokens, R rows, P pages that a row can have, L layers, K kv heads, h head dim, D model, V vocabulary, W
wanted tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Num

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.model.decode import cached_block, cached_layers, own_logits
from glm45_jax.model.decoder import embed, head_logits, mtp_embed_weight, mtp_input, mtp_layer, mtp_module
from glm45_jax.model.layers import rms_norm, rotary_tables
from glm45_jax.model.over_mesh import mesh_in_force, shard_map
from glm45_jax.model.params import Params, specs_of, whole
from pallas_kernels import paged_attention


class Ragged(NamedTuple):
    """Rows of new tokens. What stands behind the last live row's is padding, computed and read by no one."""

    tokens: Int[Array, " N"]
    starts: Int[Array, " R+1"]  # row r has the tokens starts[r] : starts[r + 1]
    lengths: Int[Array, " R"]  # tokens of the sequence, the new ones included
    page_table: Int[Array, "R P"]
    num_rows: Int[Array, ""]  # live ones; the others' entries don't matter

    def positions(self) -> Int[Array, " N"]:
        """Of each token in its sequence; padding stands at 0."""
        place = jnp.arange(self.tokens.shape[0])
        row = jnp.clip(jnp.searchsorted(self.starts, place, side="right") - 1, 0, self.lengths.shape[0] - 1)
        live = place < self.starts[self.num_rows]
        return jnp.where(live, self.lengths[row] - self.starts[row + 1] + place, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedPages:
    """Pages in one byte, and what a stored one stands for."""

    values: Num[Array, "L n K p 2h"]
    scales: Float[Array, "L 2 K"]  # of keys, of values


Pages = Float[Array, "L n K p 2h"] | QuantizedPages


class Step(NamedTuple):
    """What a step gives."""

    logits: Float[Array, "W V"]  # float32
    hidden: Float[Array, "N D"]  # after the final norm
    pages: Pages


def init_pages(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: Any = None,
    scales: Float[Array, "L 2 K"] | None = None,
) -> Pages:
    """Empty pages of all layers, the MTP layer's last: each holds `page_size` tokens of one sequence.

    Args:
      dtype: of what they hold; by default the model's. int8 and float8_e4m3fn need `scales`.

    Raises:
      UserError: scales missing, of another shape, or of pages that are not quantised.
    """
    mesh = mesh_in_force()
    heads = max(config.num_key_value_heads, 1 if mesh is None else mesh.shape.get("tensor", 1))
    layers = config.num_hidden_layers + config.has_mtp
    dtype = jnp.dtype(dtype or config.dtype)
    found, expected = None if scales is None else scales.shape, (layers, 2, heads) if dtype.itemsize == 1 else None
    if found != expected:
        raise UserError(f"pages of {dtype} with scales {found}; expected {expected}: of each layer's keys and values")
    values = jnp.zeros((layers, num_pages, heads, page_size, 2 * config.head_dim), dtype)
    return values if scales is None else QuantizedPages(values, scales.astype(jnp.float32))


def paged_step(params: Params, config: ModelConfig, pages: Pages, batch: Ragged, wanted: Int[Array, " W"]) -> Step:
    """Reads new tokens into their pages. Donate `pages`: they are written in place.

    Args:
      wanted: places in the batch whose logits are needed.
    """

    def run(params, pages, batch, wanted):
        tokens, rotary = batch.tokens[None], rotary_tables(config, batch.positions()[None])
        h, pages = cached_layers(params, config, tokens, rotary, pages, _attention(batch, config))
        return own_logits(params, config, h[0, wanted]), h[0], pages

    return Step(*_over_mesh(run, config, params, pages, (batch, wanted)))


def mtp_paged_step(
    params: Params,
    config: ModelConfig,
    pages: Pages,
    batch: Ragged,
    hidden: Float[Array, "N D"],
    wanted: Int[Array, " W"],
) -> Step:
    """The MTP layer over pages: from what stands at a place and the token after it to the token after that.

    To draft several tokens in a chain, its own `hidden` goes in again, one place further on.

    Args:
      batch: its tokens are those that come after the places; lengths count the places.
      hidden: at each place, after the final norm.
    """
    if not config.has_mtp:
        raise UserError("this model has no MTP layer (num_nextn_predict_layers is 0)")

    def run(params, pages, batch, hidden, wanted):
        module = mtp_module(params, mtp_layer(params), config)
        z = mtp_input(module, config, hidden[None], embed(mtp_embed_weight(params, config), batch.tokens[None], config))
        rotary = rotary_tables(config, batch.positions()[None])
        z, pages = cached_block(
            module.block, config, z, rotary, pages, _attention(batch, config), config.num_hidden_layers
        )
        z = rms_norm(z, module.norm.scale[...], config.rms_norm_eps)[0]
        if not config.mtp_own_head:
            return own_logits(params, config, z[wanted]), z, pages
        head = whole(params["mtp"]["head"]["weight"], config, (None, "embed"))
        return head_logits(z[wanted], head), z, pages

    return Step(*_over_mesh(run, config, params, pages, (batch, hidden, wanted)))


def _attention(batch: Ragged, config: ModelConfig) -> Any:
    def attend(q, k, v, pages, layer):
        flat = lambda x: x[0].swapaxes(0, 1)  # noqa: E731  [1, H, N, h] -> [N, H, h]
        values, scales = (pages.values, pages.scales) if isinstance(pages, QuantizedPages) else (pages, None)
        out, values = paged_attention(
            flat(q), flat(k), flat(v), values, batch.page_table, batch.lengths, batch.starts, batch.num_rows,
            layer=layer, kv_scale=scales, implementation=config.implementation,
        )  # fmt: skip
        return out.swapaxes(0, 1)[None], values if scales is None else QuantizedPages(values, scales)

    return attend


def _over_mesh(run: Any, config: ModelConfig, params: Params, pages: Any, rest: Any) -> Any:
    """`run(params, pages, *rest)`: heads and vocabulary cut over `tensor`, experts as the rules say, all else alike."""
    mesh = mesh_in_force()
    if mesh is None:
        return run(params, pages, *rest)
    heads = "tensor" if mesh.shape.get("tensor", 1) > 1 else None
    same = PartitionSpec()
    of_pages = jax.tree.map(lambda _: PartitionSpec(None, None, heads), pages)  # scales too: heads are their third axis
    specs = specs_of(params, config, mesh), of_pages, *jax.tree.map(lambda _: same, rest)
    return shard_map(run, specs, (PartitionSpec(None, heads), same, of_pages))(params, pages, *rest)
