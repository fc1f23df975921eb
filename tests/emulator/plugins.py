"""What TensorRT has for plugins: the classes that plugins/tensorrt.py builds on, and the registry of its creators."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import SimpleNamespace

import numpy as np

from plugins.artifacts import Artifacts
from plugins.op import MODEL_DTYPES
from plugins.registry import OPS
from plugins.tensorrt import DTYPE, KERNELS, NAMESPACE


class _Interface:
    def __init__(self) -> None:
        pass


class PluginField:
    """A named number, or bytes."""

    def __init__(self, name: str, data: object, kind: int) -> None:
        self.name, self.data = name, data


class Registry:
    """Creators by the name of their op."""

    def __init__(self) -> None:
        self.creators: dict[str, object] = {}

    def register_creator(self, creator: object, namespace: str) -> bool:
        known = creator.name in self.creators
        self.creators[creator.name] = creator
        return namespace == NAMESPACE and not known


CLASSES = {
    "IPluginV3": type("IPluginV3", (_Interface,), {}),
    "IPluginV3OneCore": type("IPluginV3OneCore", (_Interface,), {}),
    "IPluginV3OneBuild": type("IPluginV3OneBuild", (_Interface,), {}),
    "IPluginV3OneRuntime": type("IPluginV3OneRuntime", (_Interface,), {}),
    "IPluginCreatorV3One": type("IPluginCreatorV3One", (_Interface,), {}),
    "PluginField": PluginField,
    "PluginFieldType": SimpleNamespace(INT32=0, INT8=1),
    "PluginFieldCollection": list,
    "TensorRTPhase": IntEnum("TensorRTPhase", {"BUILD": 0, "RUNTIME": 1}),
    "DataType": IntEnum("DataType", {"FLOAT": 0, "HALF": 1, "INT8": 2, "INT64": 8, "BF16": 9}),
    "TensorFormat": SimpleNamespace(LINEAR=0),
}


def made(
    registry: Registry, op_type: str, node: str, attributes: Mapping[str, object], dtype: str, artifacts: Artifacts
) -> object:
    """The plugin of a flex:: node, made as an engine file makes it. `dtype`: of the model."""
    numbers = {name: int(value) for name, value in attributes.items() if name in OPS[op_type].attribute_names}
    fields = [PluginField(name, np.array([value], np.int32), 0) for name, value in numbers.items()]
    fields.append(PluginField(DTYPE, np.array([MODEL_DTYPES.index(dtype)], np.int32), 0))
    code = artifacts.subset(OPS[op_type](**numbers).kernels(dtype), artifacts.sms).to_bytes()
    fields.append(PluginField(KERNELS, np.frombuffer(code, np.int8), 1))
    return registry.creators[op_type].create_plugin(node, fields, CLASSES["TensorRTPhase"].RUNTIME)
