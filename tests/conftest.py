"""Settings of all tests."""

from hypothesis import settings

# no deadline: a loaded machine is slow, not wrong
settings.register_profile("longhaul", deadline=None)
settings.load_profile("longhaul")
