"""Sources `hub:ORG/NAME@REVISION`: their names, their download in a worker process, their cache."""
