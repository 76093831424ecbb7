"""The `cluster` command. `main` has the application; each command is a module of its own."""
