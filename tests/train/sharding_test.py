"""The mesh of a config, and where each parameter lies on it. Arrays on eight devices: tests/multi_device_test.py."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as Spec

from omniopd_jax import models
from omniopd_jax.config import ConfigError, MeshConfig
from omniopd_jax.train import sharding


def devices(count):
    return [jax.devices()[0]] * count


def test_the_rest_goes_to_minus_one():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1, tensor=1), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, -1, 3), (4, 2, 2)])
def test_sizes_that_do_not_multiply_to_the_devices(sizes):
    with pytest.raises(ConfigError, match=r"config\.mesh \(data=.*does not fit 8 devices.*must multiply to 8"):
        sharding.make_mesh(MeshConfig(*sizes), devices(8))


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1), (-2, 1, 1)])
def test_sizes_that_mean_nothing(sizes):
    with pytest.raises(ConfigError, match="at most one of them is -1"):
        sharding.make_mesh(MeshConfig(*sizes), devices(8))


def abstract(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def test_a_batch_or_a_model_that_does_not_divide(make_config, model):
    config = make_config()
    with pytest.raises(ConfigError, match=r"rollout\.batch_size=8 must be a multiple of 3"):
        sharding.check_batch(abstract(3, 1, 1), config)
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size=2 must be a multiple of 4"):
        sharding.check_batch(abstract(2, 2, 1), make_config(**{"train.micro_batch_size": 2}))
    with pytest.raises(ConfigError, match=r"rollout\.slots=6 must be a multiple of 4"):
        sharding.check_batch(abstract(2, 2, 1), make_config(**{"rollout.slots": 6}))
    in_parts = {"rollout.batch_size": 16, "pipeline.micro_batches": 4}  # of rollouts of 4, 4 and 8 none is refilled
    sharding.check_batch(abstract(2, 2, 1), make_config(**in_parts, **{"rollout.slots": 10}))
    with pytest.raises(ConfigError, match=r"mesh\.tensor=3 does not divide the model's attention heads, 4"):
        sharding.check_model(abstract(1, 1, 3), model.config)
    sharding.check_batch(abstract(2, 2, 2), config)
    sharding.check_model(abstract(2, 2, 2), model.config)


def test_every_logical_axis_of_the_models_has_a_rule():
    from omniopd_jax.models.parameters import AXES

    assert set(AXES) | {"rank"} == set(sharding.RULES)


def test_parameters_lie_where_the_table_says(model):
    mesh = abstract(1, 4, 2)
    found = sharding.model_shardings(mesh, model)
    attention = found["layers"]["attention"]
    assert attention["q_proj"]["kernel"].spec == Spec(None, "fsdp", "tensor", None)
    assert attention["o_proj"]["kernel"].spec == Spec(None, "tensor", None, "fsdp")
    assert found["embedding"].spec == Spec("tensor", "fsdp")
    assert found["final_norm"]["scale"].spec == Spec("fsdp")
    # two key/value heads on four devices stay whole
    assert sharding.model_shardings(abstract(1, 2, 4), model)["layers"]["attention"]["k_proj"]["kernel"].spec == Spec(
        None, "fsdp", None, None
    )
    same = sharding.config_shardings(mesh, model.config)
    assert jax.tree.structure(same) == jax.tree.structure(model.params)
    assert jax.tree.leaves(same) == jax.tree.leaves(found)


def test_adapters_lie_with_their_layer(model):
    adapted = models.add_adapters(model, jax.random.key(0), rank=2, alpha=4.0)
    found = sharding.axes_shardings(abstract(1, 4, 2), adapted.adapters, sharding.trainable_axes(adapted))
    assert found["layers"]["attention"]["q_proj"]["a"].spec == Spec(None, "fsdp", None)
    assert found["layers"]["attention"]["q_proj"]["b"].spec == Spec(None, None, "tensor", None)


def test_placing_keeps_the_numbers(model):
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    moved = sharding.placed(model, mesh)
    jax.tree.map(np.testing.assert_array_equal, moved.params, model.params)
    assert moved.module.layout.mesh == mesh
    assert dataclasses.replace(moved, params=None, module=model.module) == dataclasses.replace(model, params=None)
