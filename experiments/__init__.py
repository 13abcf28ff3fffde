"""The debug run and the programs beside it."""
