"""One module a command, each with a click command named `command`. main.COMMANDS lists them and imports one only when it is asked for."""
