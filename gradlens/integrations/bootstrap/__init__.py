"""`gradlens run` puts this folder first on PYTHONPATH: Python imports `sitecustomize` from it before a script starts."""
