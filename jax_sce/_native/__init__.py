"""Where `libjax_sce_rows.so` is installed, if it was built."""
