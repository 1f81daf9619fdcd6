"""The subcommands of `megapt`, a file per family; each imports its job when it runs."""
