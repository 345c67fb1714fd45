"""Engines on the nodes of a Ray cluster, which the launcher need not own; the one file that imports ray."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util import get_node_ip_address, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megarl.config import Config
from megarl.processes import python_path
from megarl.rollout.connection import Invitation
from megarl.rollout.engine import EngineDied
from megarl.rollout.hosts import JOIN_SECONDS, Host, Nodes
from megarl.types import UserError

REACH_SECONDS = 10.0
Resources = dict[str, float]


class _Host:
    """A host as an actor: it lives in the process that Ray starts for it, until its placement group is removed."""

    def __init__(self, config: Config, invitation: Invitation, node: int, nodes: int) -> None:
        self._host = Host(config, invitation, node, nodes)

    def is_up(self) -> None:
        """Raises what hinders it."""


class RayNodes(Nodes):
    """Nodes of the Ray cluster that RAY_ADDRESS names, or of this machine's: each has a host, which is an actor."""

    def __init__(self, config: Config, say: Callable[[str], object]) -> None:
        try:
            if named := re.fullmatch(r"(.+):(\d+)", os.environ.get("RAY_ADDRESS", "")):
                socket.create_connection((named[1], int(named[2])), REACH_SECONDS).close()  # ray tries for minutes
            ray.init("auto", runtime_env={"env_vars": python_path()}, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"rollout.placement=ray finds no Ray cluster ({str(error).splitlines()[0]}); start one with "
                "'ray start', and name it by RAY_ADDRESS where it isn't this machine's"
            ) from None
        count, self._share = shares(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        super().__init__(config, count, say, here=False)
        self._config, self._count = config, count
        self._group = placement_group([self._share] * count, strategy="STRICT_SPREAD")

    @property
    def invitation(self) -> Invitation:
        own = super().invitation
        return replace(own, addresses=[*own.addresses, get_node_ip_address()])

    async def meet(self) -> None:
        await asyncio.gather(super().meet(), asyncio.to_thread(self._start_hosts))

    def close(self) -> None:
        super().close()
        remove_placement_group(self._group)  # and the actors in it
        ray.shutdown()

    def _start_hosts(self) -> None:
        if not self._group.wait(JOIN_SECONDS):
            raise EngineDied(f"the Ray cluster has not had {self._share} free on {self._count} nodes for a while")
        actor: Any = ray.remote(_Host)
        self._hosts = [
            actor.options(
                num_cpus=self._share["CPU"],
                num_gpus=self._share.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=node),
            ).remote(self._config, self.invitation, node, self._count)
            for node in range(self._count)
        ]
        try:
            ray.get([host.is_up.remote() for host in self._hosts])
        except RayError as error:
            raise EngineDied(str(error).strip().splitlines()[-1]) from None


def shares(config: Config, nodes: list[Resources]) -> tuple[int, Resources]:
    """How many of the nodes to use, as many as there are engines if possible, and what each has to have."""
    engines, size = config.rollout.engines, config.rollout.tensor_parallel_size
    for count in range(min(engines, len(nodes)), 0, -1):
        most = float(-(-engines // count))
        share = {"CPU": most} | ({"GPU": most * size} if torch.cuda.is_available() else {})
        if sum(all(node.get(name, 0) >= share[name] for name in share) for node in nodes) >= count:
            return count, share
    needed = "a CPU" + (f" and {size} GPUs" if torch.cuda.is_available() else "")
    has = [{name: node.get(name, 0) for name in ("CPU", "GPU")} for node in nodes]
    raise UserError(f"rollout.engines={engines}: each needs {needed} of the Ray cluster, whose nodes have {has}")
