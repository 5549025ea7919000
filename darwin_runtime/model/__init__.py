"""One loaded model. Of the rooms, only this one knows MLflow's model side."""
