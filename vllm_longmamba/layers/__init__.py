"""The filter in a layer: which tokens of a step it may filter, by which row of the table, and the mixers that do it."""
