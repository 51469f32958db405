"""What each plot of the page shows, and how to read it."""

# heading of the section → plot → its title and text
SECTIONS = {
    "Perplexity against cost": {
        "perplexity_operations": (
            "Perplexity against operations",
            "Operations are multiply-adds of one word's forward pass, softmax excluded. "
            "Points above each other cost the same for each word: the lower one makes better use of it. "
            "Several seeds are dashes around their mean; a name that finds no room is only in the table. Hollow grey "
            "marks are what the paper prints, beside runs that have its sizes and its test text.",
        ),
        "perplexity_parameters": (
            "Perplexity against parameters",
            "Only the matrices between embedding and softmax are counted. A falling line says that models "
            "with more of them predict better; that capacity alone does it, only if the operations and the "
            "training words are equal.",
        ),
        "perplexity_flops": (
            "Perplexity against training FLOPs",
            "The whole of training: forward, backward and softmax, a multiply-add counted as two. "
            "Lower and further left is better. It counts work, not time.",
        ),
    },
    "Training": {
        "training": (
            "Training loss",
            "As logged, not smoothed, with dropout and gate noise on. With a sampled softmax it lies "
            "below the true loss, so compare it between runs and not with the validation perplexity.",
        ),
        "validation": (
            "Validation perplexity",
            "Full softmax, on the fixed part of the validation text that the run's configuration names; "
            "the table's figures are over all of it. Where the learning rate falls to the end of a "
            "schedule, only the ends of the lines are a fair comparison.",
        ),
    },
    "Expert load": {
        "cv_importance": (
            "Balance of importance",
            "Standard deviation over mean of the gate values summed for each expert: "
            "0 is perfect balance, a rising line says that few experts take over.",
        ),
        "cv_load": (
            "Balance of load",
            "The same for each expert's load: with noisy top-k gating the number of words expected under its noise "
            "(equation 10), with other gates the number sent there, which chance alone keeps above 0 where batches "
            "are small and experts many.",
        ),
        "max_over_mean_load": (
            "Largest load",
            "The largest of these loads over their mean, as in the paper's Table 6.",
        ),
        "max_over_mean_tokens": (
            "Busiest expert",
            "The words that the busiest expert took in a batch over the mean, counted: with one expert on each device, "
            "about how many times longer the experts' part of a step takes than if all took equally many.",
        ),
    },
}
