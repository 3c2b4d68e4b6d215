"""What hands the library to a framework, one module for each: :mod:`dear.integrations.lightning` and so on.

Each can be imported without its framework, and says what to install when it is used.
"""
