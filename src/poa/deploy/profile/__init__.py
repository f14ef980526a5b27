"""What sub-networks cost on a device: measured, or predicted by a model fitted to what was measured."""

from poa.deploy.profile.table import ProfileRow, Setting, family_key, read_profile, write_profile

__all__ = ["ProfileRow", "Setting", "family_key", "read_profile", "write_profile"]
