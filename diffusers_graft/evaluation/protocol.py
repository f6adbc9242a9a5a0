"""The protocol of a measurement: everything but the model that decides a number, as flat names and values."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

_LIBRARIES = ("torch", "diffusers", "transformers", "diffusers-graft")


def describe_computation(model: nn.Module) -> dict[str, Any]:
    """Return what decides a model's numbers beside its weights: dtype, TF32 and the versions of libraries."""
    parameter = next(model.parameters(), torch.empty(0))
    protocol: dict[str, Any] = {
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "tf32": _describe_tf32(parameter.device),
    }
    for library in _LIBRARIES:
        try:
            version = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
        # Builds for other hardware have the version of the same source.
        protocol[library.replace("-", "_")] = version.partition("+")[0]
    return protocol


def _describe_tf32(device: torch.device) -> str:
    """Return where TF32 rounds products of float32; only GPUs have it."""
    if device.type != "cuda":
        return "off"
    places = []
    if torch.get_float32_matmul_precision() != "highest":
        places.append("matmul")
    if torch.backends.cudnn.allow_tf32:
        places.append("convolutions")
    return " and ".join(places) or "off"


def describe_metric(metric: Any) -> dict[str, Any]:
    """Return the settings of a metric under its name, `FID.samples`; those of a function, which shows none, are none.

    A metric with a method `protocol` says itself what it measured by.
    """
    # Without its module: a class that moves within the library is still the same metric.
    name = type(metric).__name__
    settings: dict[str, Any] = {}
    if hasattr(metric, "protocol"):
        settings = metric.protocol()
    elif is_dataclass(metric) and not isinstance(metric, type):
        settings = {field.name: getattr(metric, field.name) for field in fields(metric)}
    return {f"{name}.{setting}": value for setting, value in settings.items()}


def describe_protocol(protocol: Mapping[str, Any]) -> str:
    """Return a protocol in words, as cards print it."""
    return ", ".join(f"{name} {value}" for name, value in protocol.items())


def protocol_differences(protocols: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what differs between protocols: by setting, the value of every row.

    Args:
        protocols: by name of the row. Settings of a metric, such as `FID.samples`, differ where two rows have them and
            disagree; all others also where a row lacks them.
    """
    names = dict.fromkeys(name for protocol in protocols.values() for name in protocol)
    # All rows at once, so that a message can say what each of them has.
    differences = {}
    for name in names:
        values = {row: protocol.get(name) for row, protocol in protocols.items()}
        # A metric that only some rows were measured by leaves empty cells, which compare nothing.
        compared = [value for row, value in values.items() if "." not in name or name in protocols[row]]
        if any(value != compared[0] for value in compared):
            differences[name] = values
    return differences


def group_by_protocol(protocols: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return the names of rows that may stand in one table, table by table, in order of appearance."""
    groups: list[list[str]] = []
    for name in protocols:
        for group in groups:
            # A row must agree with all others of a table: it may lack what only two of them share.
            if not protocol_differences({row: protocols[row] for row in [*group, name]}):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups
