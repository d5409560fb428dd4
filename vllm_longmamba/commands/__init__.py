"""The subcommands of `longmamba`: one module, and in it one function, for each."""
