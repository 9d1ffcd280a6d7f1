"""From a data set to the batches of each client: sources, partition, cohort, augmentation."""
