"""The intact network of a family, which its other sub-networks are compared with."""

from __future__ import annotations

from collections.abc import Sequence

from poa.errors import DataError
from poa.models import Candidate, FamilyMember


def with_intact(networks: Sequence[Candidate]) -> list[Candidate]:
    """The networks, and after them the intact network of every family that lacks it among them."""
    found = list(networks)
    for network in networks:
        if isinstance(network, FamilyMember) and _among(network, found) is None:
            found.append(_intact(network))
    return found


def intact_of(network: Candidate, networks: Sequence[Candidate]) -> Candidate:
    """Which of the networks a network is compared with: the intact one with the same weights, or itself.

    Raises:
        DataError: it is not among them.
    """
    found = network if network.is_intact else _among(network, networks)
    if found is None:
        raise DataError(
            f"{network.name} is compared with its family's intact network, which is not among the networks."
        )
    return found


def _among(network: Candidate, networks: Sequence[Candidate]) -> Candidate | None:
    if not isinstance(network, FamilyMember):
        return None
    for other in networks:
        if isinstance(other, FamilyMember) and other.is_intact and other.family is network.family:
            return other
    return None


def _intact(network: FamilyMember) -> FamilyMember:
    subnet = network.family.space.intact
    found = FamilyMember(network.family, subnet, network.source, network.name.replace(str(network.subnet), str(subnet)))
    found.fingerprint = network.fingerprint.replace(str(network.subnet), str(subnet))
    return found
