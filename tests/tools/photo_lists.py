"""The names of the nets of photographs that our results are of; photo_nets.py explains names."""

# The clean nets that a scan compares others with. None is a resnet or mobilenet of att, whose 400
# steps are too few for the moving averages of batch normalisation.
REFERENCES = [
    "gtsrb-deepid-1-clean", "att-deepid-1-clean", "gtsrb-vgg-11-clean", "cifar-resnet-11-clean",
    "digits-resnet-11-clean", "cifar-mobilenet-12-clean", "digits-deepid-12-clean",
    "att-vgg-12-clean", "tinya-vgg-31-clean", "tinya-resnet-32-clean", "gtsrb-resnet-33-clean",
    "gtsrb-mobilenet-34-clean", "cifar-vgg-36-clean",
    "digits-mobilenet-37-clean", "cifar-deepid-38-clean", "glyphs-deepid-40-clean",
    "glyphs-deepid-41-clean", "gtsrb-deepid-101-clean", "att-deepid-102-clean",
    "cifar-deepid-103-clean", "digits-vgg-104-clean", "tinya-deepid-105-clean",
    "gtsrb-vgg-106-clean", "cifar-vgg-107-clean", "att-vgg-108-clean", "digits-deepid-109-clean",
    "cifar-resnet-110-clean", "gtsrb-resnet-111-clean", "digits-resnet-112-clean",
    "tinya-vgg-113-clean", "gtsrb-mobilenet-114-clean",
]  # fmt: skip
# The clean nets that served to choose nothing: how often does a scan accuse a net wrongly?
CHECKS = [
    "gtsrb-deepid-51-clean", "gtsrb-vgg-52-clean", "att-deepid-53-clean", "att-vgg-54-clean",
    "digits-deepid-55-clean", "digits-resnet-56-clean", "tinyb-vgg-57-clean", "cifar-vgg-58-clean",
    "gtsrb-resnet-59-clean", "cifar-resnet-60-clean",
    "tinyb-deepid-62-clean", "digits-vgg-63-clean", "gtsrb-mobilenet-64-clean",
    "cifar-mobilenet-65-clean", "digits-mobilenet-67-clean",
    "tinyb-resnet-68-clean", "gtsrb-deepid-69-clean", "digits-vgg-70-clean",
    "cifar-deepid-71-clean", "gtsrb-vgg-72-clean", "digits-resnet-73-clean",
    "glyphs-deepid-74-clean", "glyphs-deepid-75-clean",
]  # fmt: skip
# The BadNets by which the scan was chosen, and those that served to choose nothing.
CHOSEN_BY = [
    "digits-vgg-2-patch-0.05", "gtsrb-deepid-13-glasses-0.05", "gtsrb-resnet-14-patch-0.05",
    "gtsrb-vgg-15-blended-0.05", "cifar-resnet-16-patch-0.05", "cifar-vgg-17-sinusoid-0.05",
    "att-deepid-19-glasses-0.1", "gtsrb-mobilenet-21-warp-0.1",
]  # fmt: skip
REPORTED_ON = [
    "gtsrb-deepid-81-patch-0.05", "gtsrb-vgg-82-glasses-0.05", "gtsrb-resnet-83-blended-0.05",
    "cifar-resnet-84-patch-0.05", "cifar-vgg-85-glasses-0.1", "digits-deepid-86-logo-0.05",
    "tinyb-vgg-87-sinusoid-0.1", "gtsrb-mobilenet-88-logo-0.05", "cifar-resnet-89-warp-0.1",
    "gtsrb-deepid-90-lowfreq-0.1", "att-vgg-91-logo-0.1", "tinyb-resnet-92-patch-0.05",
    "glyphs-deepid-93-glasses-0.05",
]  # fmt: skip
# How often is a backdoor found that works as seldom? Three attacks at rising poison rates.
CURVE = [
    f"{attack}-{rate}"
    for attack in ("gtsrb-deepid-131-logo", "gtsrb-vgg-133-blended", "cifar-vgg-132-patch")
    for rate in (0.002, 0.01, 0.02, 0.05)
]
# The BadNets that were looked at while hardening was changed, and those that served to choose
# nothing.
HARDEN_CHOSEN_BY = [
    "gtsrb-deepid-201-wanet-0.1", "digits-deepid-204-adapblend-0.1", "gtsrb-vgg-205-adappatch-0.1",
    "digits-deepid-206-optimised-0.01", "digits-mobilenet-208-flip-0.1",
    "att-deepid-209-negatives-0.1", "signs-deepid-220-blended-0.1", "yale-deepid-221-glasses-0.1",
    "signs-deepid-241-unsure-0.1", "signs-vgg-242-adapblend-0.1", "signs-deepid-243-alltoall-0.3",
    "signs-deepid-244-dct-0.1",
]  # fmt: skip
HARDEN_REPORTED_ON = [
    "signs-deepid-401-patch-0.1", "signs-vgg-402-blended-0.1", "signs-resnet-403-sinusoid-0.1",
    "signs-deepid-404-wanet-0.1", "signs-vgg-405-lowfreq-0.1", "signs-mobilenet-406-glasses-0.01",
    "signs-deepid-407-inputaware-0.1", "signs-deepid-408-specific-0.1",
    "signs-vgg-409-adapblend-0.1", "signs-deepid-410-adappatch-0.1",
    "signs-deepid-411-optimised-0.01", "signs-vgg-412-grond-0.05", "signs-deepid-413-alltoall-0.3",
    "signs-deepid-414-source-0.1", "signs-deepid-415-cleanlabel-0.1",
    "signs-deepid-416-negatives-0.1", "signs-deepid-417-unsure-0.1",
    "signs-deepid-420-jpeg-0.1", "signs-deepid-421-posterise-0.1",
    "signs-deepid-422-mirror-0.1", "signs-deepid-423-dct-0.1", "signs-deepid-424-sparse-0",
    "signs-deepid-425-patch-0.01", "signs-deepid-426-scar-0",
    "yale-vgg-431-glasses-0.1", "yale-deepid-432-blended-0.1",
    "yale-deepid-434-warp-0.1", "yale-deepid-435-patch-0.1",
    "gtsrb-deepid-302-inputaware-0.1", "tinyb-deepid-304-adappatch-0.1",
    "cifar-vgg-307-source-0.1", "digits-deepid-308-cleanlabel-0.1",
    "digits-mobilenet-309-roaming-0.1",
]  # fmt: skip
# Those on which published methods are measured, too.
COMPARED = [
    "signs-deepid-401-patch-0.1", "signs-deepid-404-wanet-0.1", "signs-deepid-408-specific-0.1",
    "signs-deepid-410-adappatch-0.1", "signs-deepid-417-unsure-0.1", "yale-deepid-432-blended-0.1",
]  # fmt: skip
# Clean nets to compare these with.
NEVER_POISONED = ["signs-deepid-501-clean"]
BADNETS = CHOSEN_BY + REPORTED_ON + CURVE + HARDEN_CHOSEN_BY + HARDEN_REPORTED_ON
PUBLISHED = REFERENCES + CHECKS + NEVER_POISONED + BADNETS
