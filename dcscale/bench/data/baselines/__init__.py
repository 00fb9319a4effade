"""Other libraries, each used as its documentation says; a module is imported only where its reader is asked for."""
