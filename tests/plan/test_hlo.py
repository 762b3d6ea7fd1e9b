"""What is read out of compiled programs, on texts of the forms that XLA writes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gvjax import sharding
from gvjax.plan import hlo

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def text(groups, kind="all-gather", shape="f32[4,8]{1,0}", suffix=""):
    return f"""\
%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %c.1 = {shape} {kind}{suffix}(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}
}}
%condition.1 (p: (s32[], f32[8])) -> pred[] {{
  %n = s32[]{{:T(128)}} constant(24)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}
ENTRY %main (a: f32[8]) -> f32[8] {{
  %w = (s32[], f32[8]) while(%t), condition=%condition.1, body=%body.1, metadata={{}}
}}
"""


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", "tensor"),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("[4,2]<=[8]", "tensor"),
        ("[4,2]<=[2,2,2]T(0,2,1)", "fsdp"),
        ("[2,4]<=[8]", "fsdp x tensor"),
        ("{}", "data x fsdp x tensor"),
        ("mesh['a'=2,'b'=4] {'a'}", "data"),
        ("mesh['a'=4,'b'=2], device_ids=([8]) {'b'}", "tensor"),
        ("mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}", "data x tensor"),
        ("{{0,1,2},{3,4,5},{6,7}}", "part of data x fsdp x tensor"),
    ],
)
def test_groups_are_named_by_mesh_axes(groups, axes):
    (found,) = hlo.collectives(text(groups), MESH)
    assert (found.kind, found.axes) == ("all-gather", axes)


def test_loops_count_as_often_as_they_run():
    (found,) = hlo.collectives(text("[4,2]<=[8]"), MESH)
    assert (found.count, found.bytes) == (24, 24 * 4 * 8 * 4)
    assert found.largest == "f32[4,8]"


def test_an_asynchronous_start_counts_what_arrives():
    pair = text("[4,2]<=[8]", shape="(f32[2,8]{1,0}, f32[4,8]{1,0})", suffix="-start")
    (found,) = hlo.collectives(pair, MESH)
    assert found.bytes == 24 * 4 * 8 * 4
    combined = text("[4,2]<=[8]", shape="(bf16[2,8]{1,0}, f32[4,8]{1,0})")
    (found,) = hlo.collectives(combined, MESH)
    assert found.bytes == 24 * (2 * 8 * 2 + 4 * 8 * 4)


@pytest.mark.parametrize(
    ("shape", "kind", "size"),
    [
        ("((f32[2,8]{1,0}), f32[4,8]{1,0})", "all-gather", 128),
        (
            "((f32[2,8]{1,0}, /*index=1*/bf16[2,8]{1,0}), (f32[4,8]{1,0}, bf16[4,8]{1,0}))",
            "all-gather",
            128 + 64,
        ),
        ("(f32[4,8]{1,0}, f32[4,8]{1,0}, u32[], u32[])", "collective-permute", 128),
        ("(f32[4,8]{1,0}, f32[8]{0})", "all-reduce", 128 + 32),
        ("f32[4,8]{1,0:T(8,128)}", "all-reduce", 128),
    ],
)
def test_asynchronous_starts_of_several_count_all_that_arrives(shape, kind, size):
    groups = "{{0,1},{2,3},{4,5},{6,7}}"
    (found,) = hlo.collectives(text(groups, kind, shape, "-start"), MESH)
    assert (found.kind, found.bytes) == (kind, 24 * size)


def test_a_loop_whose_condition_is_a_fusion():
    fused = text("[4,2]<=[8]").replace(
        "%condition.1 (p: (s32[], f32[8])) -> pred[] {",
        "%fused_compare (q: s32[]) -> pred[] {",
    )
    fused = fused.replace(
        "ENTRY",
        "%condition.1 (p: (s32[], f32[8])) -> pred[] {\n"
        "  ROOT %f = pred[] fusion(%i), kind=kLoop, calls=%fused_compare, metadata={}\n}\nENTRY",
    )
    (found,) = hlo.collectives(fused, MESH)
    assert found.count == 24


def test_one_device_groups_move_nothing():
    assert hlo.collectives(text("{{0},{1},{2},{3}}"), MESH) == []


def test_a_program_compiled_here():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices()[:8])
    split = NamedSharding(mesh, P(None, "tensor"))
    whole = NamedSharding(mesh, P())
    compiled = (
        jax.jit(lambda x: x * 2, out_shardings=whole)
        .lower(jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=split))
        .compile()
    )
    (found,) = hlo.collectives(compiled.as_text(), dict(mesh.shape))
    assert (found.kind, found.axes, found.bytes) == (
        "all-gather",
        "tensor",
        16 * 32 * 4,
    )


def test_the_largest_array_has_most_numbers_and_not_most_bytes():
    lines = "%a = f32[2,3]{1,0} add(%b), %c = (bf16[9]{0}, s32[], pred[]) tuple()"
    assert hlo.largest_array(lines) == "bf16[9]"


@pytest.mark.parametrize("call", [jax.debug.callback, jax.pure_callback])
def test_a_way_into_python_is_found(call):
    def program(x):
        x = x * 2
        if call is jax.pure_callback:
            return call(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        call(print, x)
        return x

    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    (found,) = hlo.host_calls(jax.jit(program).lower(shape).compile().as_text())
    assert "callback" in found
    alone = jax.jit(lambda x: x * 2).lower(shape).compile().as_text()
    assert hlo.host_calls(alone) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            "%c.8 = (f32[8]{0}, u32[], token[]) send(%x.1, %c.7), channel_id=1, is_host_transfer=true",
            ["send"],
        ),
        (
            "%c.9 = (f32[8]{0}, u32[], token[]) recv(%c.8), channel_id=2, is_host_transfer=true, frontend_attributes={}",
            ["recv"],
        ),
        # Between devices.
        ("%c.8 = (f32[8]{0}, u32[], token[]) send(%x.1, %c.7), channel_id=1", []),
        ("%i = (f32[8]{0}, token[]) infeed(%t)", ["infeed"]),
        ("%o = token[] outfeed(%x, %t)", ["outfeed"]),
        ('custom_call_target="tpu_custom_call"', []),
    ],
)
def test_ways_to_the_host_as_accelerators_write_them(line, found):
    assert hlo.host_calls(line) == found
