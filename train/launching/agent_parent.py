"""How torchrun's process learns whose child it is."""

AGENT_PARENT = "LONGHAUL_AGENT_PARENT"  # the process that it ends with
