"""demem_lab: who pays for the privacy of robust models, and can only those at risk be protected?"""

__version__ = "0.1.0"
