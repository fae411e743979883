"""Pictures of results, a file per subject: the only place that imports matplotlib, when a picture was asked for."""
