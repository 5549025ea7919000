"""Models on disk and on the way there. Of the rooms, only this one knows MLflow's client side."""
