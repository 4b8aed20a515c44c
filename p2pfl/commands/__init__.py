"""Commands in groups, each a typer app that `p2pfl.cli` puts together: what a person types, and what is said."""
