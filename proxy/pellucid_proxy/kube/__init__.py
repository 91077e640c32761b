"""The cluster's API server as the agent speaks with it: few kinds, little memory, and patience with all that fails (ADR 26)."""
