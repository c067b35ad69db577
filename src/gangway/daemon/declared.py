"""What is declared: a front whose files say which networks and ports there are to be.

A container need not exist: it is attached, and its ports are published, as soon as it does.  What cannot be served is
logged once, and tried again with each thorough check.  What a file declares can be removed by that file only.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from gangway.daemon import audit
from gangway.daemon.declaration import (
    Declaration,
    DeclaredContainer,
    DeclaredPort,
    Document,
    merge,
    parse_document,
)
from gangway.daemon.declared_files import DeclaredFiles
from gangway.daemon.difference import (
    Attach,
    CreateNetwork,
    Current,
    Detach,
    Difference,
    Publish,
    RemoveNetwork,
    Step,
    Unpublish,
    check_free,
    compare,
    match,
    what,
)
from gangway.daemon.docker_ports import DockerPorts
from gangway.daemon.messages import EndpointAnswer, NetworkAnswer, NetworkRequest
from gangway.errors import Conflict, GangwayError, InvalidRequest
from gangway.host import netns, sockets
from gangway.log import Log
from gangway.model import DOCKER_PREFIX, Network, PortMapping, PortRequest, Source
from gangway.reconcile.attempts import Attempts
from gangway.state.requests import Requests


class Applied(NamedTuple):
    changes: list[str]  # what was done, or would be
    notes: list[str]  # what cannot be as it is declared, or has to wait


class WaitingPort(NamedTuple):
    container: str
    request: PortRequest
    note: str  # why it is not published


class Declared:
    """Serves what files declare.  Everything but `waiting` and `problems` is for the worker thread."""

    def __init__(self, files: DeclaredFiles, requests: Requests, ports: DockerPorts, log: Log) -> None:
        self._files, self._requests, self._ports, self._log = files, requests, ports, log
        self._attempts = Attempts(self._warn)
        self._warned = list[str]()
        self._former = Declaration()  # what the files said before they were read last
        self._notes: tuple[str, ...] = ()
        self._unserved: tuple[str, ...] = ()  # as it was logged
        self._is_unfinished = False
        self._failed = set[str]()  # containers of which something failed
        self._running: frozenset[str] = frozenset()  # the names of Docker's containers

    def __bool__(self) -> bool:
        return bool(self._files.declaration)

    @property
    def has_dockers(self) -> bool:
        """True if ports of Docker's containers are declared."""
        return any(one.is_dockers for one in self._files.declaration.containers.values())

    @property
    def has_namespaces(self) -> bool:
        """True if other containers are declared."""
        return any(not one.is_dockers for one in self._files.declaration.containers.values())

    # Serving what the files say

    def reload(self) -> list[str]:
        """Read the files, and serve what they say; log and return what is wrong, line by line."""
        self._warned.clear()
        self._attempts.forget()
        self._notes, self._former = (), self._files.declaration
        self._files.read()
        for text in self._files.mistakes():
            self._warn(text)
        self.serve()
        return [*self._warned]

    def serve(self) -> None:
        """Serve everything that can be served."""
        self._is_unfinished = not self._attempts.attempt(self._serve, "conf.d") or self._is_unfinished
        self._attempts.begin_round()  # so that `failures` are this round's, not an earlier one's
        self._unserved = (*map(_of_note, self._notes), *self._attempts.failures)

    def serve_new(self) -> None:
        """Serve the containers that have come into being; those that could not be served have to wait for `retry`."""
        names = (one for one in self._files.declaration.containers if one not in self._failed)
        if any(self._exists(one) and not self._requests.has_endpoint(one) for one in names):
            self.serve()

    def retry(self) -> None:
        """Serve the containers that have come into being, and what failed before."""
        if self._is_unfinished:
            self.serve()
        else:
            self.serve_new()

    def end(self) -> None:
        """Serve nothing any more: everything was removed, and the daemon ends."""
        self._files.forget()
        self._unserved, self._is_unfinished = (), False

    def serve_dockers(self, running: frozenset[str]) -> None:
        """Serve Docker's containers, of which those with these names run."""
        self._running = running
        if self.has_dockers:
            self.serve()

    def problems(self) -> list[str]:
        """Return what is wrong in files, and what could not be served, line by line.  It is for any thread.

        A container that does not exist is no problem: it is served when it does.
        """
        return [*self._files.mistakes(), *self._unserved]

    def waiting(self, container: str | None = None) -> list[WaitingPort]:
        """Return the declared ports, or those of a container, that are not published.  It is for any thread."""
        wanted = [one for one in self._files.declaration.containers.values() if container in (None, one.name)]
        return [WaitingPort(name, request, self._why_waiting(name)) for name, request in self._unpublished(wanted)]

    def apply(self, name: str, text: str, is_dry: bool) -> Applied:
        """Put a file with this text into the folder, and serve what it says: all of it or nothing.

        If `is_dry`, only say what would be done.  InvalidRequest, Conflict: this file or another one is wrong, or a
        port is published already.  A mistake names this file as `name`: it need not be in the folder.
        """
        path = self._files.path_for(name)
        documents = self._files.documents_with(path, parse_document(text, name))
        declaration, _ = merge(documents)
        _, contradictions = merge({name if file == path else file: one for file, one in documents.items()})
        for problem in (one for one in contradictions if one not in self._files.contradictions):
            raise InvalidRequest(problem)
        for other, problem in self._files.problems.items():
            if other != path and other not in documents:
                raise Conflict(f"nothing can be applied while another file is wrong: {problem}")
        steps, notes = self._without_others(self._compare(declaration, is_complete=True), path, documents)
        if notes and not is_dry:
            raise Conflict(notes[0])
        try:
            check_free(steps, self._current(), has_ipv6())
        except Conflict:
            if not self._requests.reap_dead_containers():
                raise
            return self.apply(name, text, is_dry)  # it was the port of a container that has just exited
        if not is_dry:
            with self._files.replaced(path, text, documents[path]):
                self._carry_out_all(steps, declaration)
        absent = (one for one in declaration.containers.values() if one.file == path and not self._exists(one.name))
        waits = (f"container {one.name} does not exist yet: it is served when it does" for one in absent)
        return Applied([*map(str, steps)], [*notes, *waits])

    # Details

    def _warn(self, text: str) -> None:
        self._warned.append(text)
        self._log.warning(text, event="not-served")

    def _serve(self) -> None:
        self._is_unfinished, self._failed = False, set()
        if not self._files.declaration and (self._requests.orphans or not self._requests.networks()):
            self._notes = ()
            return
        difference = self._compare(self._files.declaration, self._files.is_complete)
        for note in (one for one in difference.notes if one not in self._notes):
            self._warn(_of_note(note))
        self._notes = difference.notes
        failed = [step for step in difference.steps if not self._attempt(step)]
        self._failed |= {step.container for step in failed if isinstance(step, Publish)}
        self._is_unfinished = bool(failed or difference.notes)

    def _attempt(self, step: Step) -> bool:
        """Carry out a step; if not all ports of a container can be published, those that can.  False: some failed."""
        if isinstance(step, Attach | Publish) and step.container in self._failed:
            return False  # it could not be attached to its first network
        if isinstance(step, Publish) and len(step.requests) > 1:
            with suppress(GangwayError, ExceptionGroup):
                self._carry_out(step, self._files.declaration, self._former)
                return True
            done = [self._attempt(Publish(step.container, (one,))) for one in step.requests]
            return all(done)
        call = partial(self._carry_out, step, self._files.declaration, self._former)
        is_done = self._attempts.attempt(call, f"conf.d: {what(step)}")
        if isinstance(step, Attach) and not is_done and not self._requests.has_endpoint(step.container):
            self._failed.add(step.container)
        return is_done

    def _without_others(self, difference: Difference, path: str, documents: Mapping[str, Document]) -> Difference:
        """Leave out what other files than the one at `path` have been waiting for: it may fail again."""
        if not self._is_unfinished:
            return difference
        own, _ = merge({path: documents[path]})
        others, _ = merge({file: document for file, document in documents.items() if file != path})
        pending = self._compare(self._files.declaration.without(own), self._files.is_complete)
        ports = {(one.name, port.request) for one in own.containers.values() for port in one.ports}
        waiting = {*self._unpublished(others.containers.values())} - ports
        steps = list[Step]()
        for step in difference.steps:
            if isinstance(step, Publish):
                requests = tuple(one for one in step.requests if (step.container, one) not in waiting)
                steps += [Publish(step.container, requests)] if requests else []
            elif step not in pending.steps:
                steps.append(step)
        return Difference(tuple(steps), tuple(one for one in difference.notes if one not in pending.notes))

    def _carry_out_all(self, steps: Sequence[Step], declaration: Declaration) -> None:
        """Carry out all steps or none: after a failure everything is made what the files in use say."""
        for step in steps:
            try:
                self._carry_out(step, declaration, self._files.declaration)
            except BaseException as error:
                self.serve()
                if isinstance(error, GangwayError):
                    raise type(error)(f"{what(step)}: {error}") from None
                raise

    def _carry_out(self, step: Step, declaration: Declaration, former: Declaration) -> None:
        """Carry out a step, and log it as the request that it is, with the files that declare it, or did before."""
        done, files = self._done(step), _files_of(step, declaration, former)
        self._log.write(audit.declared(done, files, is_removed=isinstance(step, Unpublish | Detach | RemoveNetwork)))

    def _done(self, step: Step) -> audit.Described:
        """Carry out a step, and describe what was done."""
        match step:
            case Unpublish():
                unpublished = self._ports.unpublish(step.container, list(map(str, step.mappings)))
                return audit.planned_ports("unpublished", step.container, unpublished.published)
            case Detach():
                self._requests.detach(step.container, step.network)
                return audit.detached({"container": step.container, "network": step.network}, None)
            case RemoveNetwork():
                self._requests.remove_network(step.name)
                return audit.network_removed({"name": step.name}, None)
            case CreateNetwork():
                network = create_network(self._requests, step.declared.request, Source.DECLARED)
                return audit.network_created({}, NetworkAnswer.of(network, ()))
            case Attach():
                addresses = step.addresses
                endpoint = self._requests.attach(step.container, step.network, addresses, source=Source.DECLARED)
                return audit.attached({}, EndpointAnswer.of(endpoint))
            case Publish():
                texts, admitted = list(map(str, step.requests)), step.requests[0].admitted
                published = self._ports.publish(step.container, texts, admitted, Source.DECLARED)
                return audit.planned_ports("published", step.container, published)

    def _compare(self, declaration: Declaration, is_complete: bool) -> Difference:
        self._requests.repair()
        return compare(declaration, self._current(), self._exists, is_complete, has_ipv6())

    def _current(self) -> Current:
        requests = self._requests
        mappings = tuple(one.mapping for one in requests.mappings())
        return Current(requests.networks(), requests.endpoints(), mappings)

    def _unpublished(self, containers: Collection[DeclaredContainer]) -> list[tuple[str, PortRequest]]:
        """Return the ports of declared containers that are not published."""
        published = defaultdict[str, list[PortMapping]](list)
        for planned in self._requests.mappings() if containers else ():
            published[planned.mapping.container].append(planned.mapping)
        return [
            (one.name, request)
            for one in containers
            for request in match([port.request for port in one.ports], published[one.name], has_ipv6()).missing
        ]

    def _exists(self, container: str) -> bool:
        if container.startswith(DOCKER_PREFIX):
            return container in self._running
        return netns.exists(netns.path_of(container))

    def _why_waiting(self, container: str) -> str:
        if self._exists(container):
            return "not published: see the log"
        return f"container does not {'run' if container.startswith(DOCKER_PREFIX) else 'exist'}"


def has_ipv6() -> bool:
    """True if the kernel has IPv6, so that what is published at no address in particular is published at `::`."""
    return sockets.has_sockets("udp", 6)


def create_network(requests: Requests, request: NetworkRequest, source: Source = Source.API) -> Network:
    """Create a network; if no subnets are requested, with free ones."""
    subnets = () if request.subnets else requests.free_subnets()
    return requests.create_network(request.network(requests.uplink_mtu(), subnets, source))


def _files_of(step: Step, declaration: Declaration, former: Declaration) -> set[str]:
    """Return the files that declare what a step makes, or have declared what it removes, if that is known."""
    match step:
        case CreateNetwork():
            return {step.declared.file}
        case Attach():
            return {declaration.containers[step.container].file}
        case Publish():
            requests = set(step.requests)
            return {one.file for one in _ports_of(declaration, step.container) if one.request in requests}
        case Unpublish():
            left = {*_ports_of(former, step.container)} - {*_ports_of(declaration, step.container)}
            return {one.file for one in left}
        case Detach():
            container = former.containers.get(step.container)
            return set() if container is None else {container.file}
        case RemoveNetwork():
            network = former.networks.get(step.name)
            return set() if network is None else {network.file}


def _ports_of(declaration: Declaration, container: str) -> tuple[DeclaredPort, ...]:
    return declaration.containers[container].ports if container in declaration.containers else ()


def _of_note(note: str) -> str:
    return f"conf.d: {note}"
