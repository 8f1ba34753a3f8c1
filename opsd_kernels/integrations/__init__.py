"""The losses under the names and calls of other libraries; import the module of the library."""
