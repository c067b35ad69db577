"""Publishes new mappings: their ports are reserved, they are written to the registry, and then carried out.

Requests and adoption share it.  A failure, in whatever part of it, leaves what was there before.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from gangway.plan import MappingPlan
from gangway.reconcile.controller import Controller
from gangway.reconcile.executor import Executor
from gangway.reconcile.state import State
from gangway.state.allocate import Allocation
from gangway.state.registry import Registry


def publish(
    controller: Controller,
    registry: Registry,
    executor: Executor,
    reserve: Callable[[Allocation], object],
    check: Callable[[Sequence[MappingPlan]], object] = lambda _planned: None,
) -> tuple[MappingPlan, ...]:
    """Publish the mappings that `reserve` adds to an allocation, all or none; `check` may refuse what was decided."""
    with (
        Allocation(registry.index, executor.dataplane.steering, registry.planned) as allocation,
        ExitStack() as undo,
    ):
        reserve(allocation)
        planned = registry.add_mappings(allocation.mappings)
        allocation.mappings.clear()  # they are the registry's now
        undo.callback(registry.remove_mappings, planned)
        check(planned)
        if planned:
            controller.carry_out(State(), registry.state_of(planned), allocation.reserved())
        undo.pop_all()
    return planned
