"""The methods: a folder each, over the interface in `gcpo.methods.base`."""
