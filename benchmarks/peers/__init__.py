"""The same echo on other servers, one program each, run in a virtual environment of their own."""
