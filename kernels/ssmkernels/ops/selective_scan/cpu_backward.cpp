// The selective scan of real states, backward.
#include "selective_scan/cpu_backward.h"

SSMZOO_EXPORT(selective_scan_backward)(const ssmzoo::ScanBackwardArguments* b) {
    using namespace ssmzoo::SSMZOO_ISA;
    return scan_backward<Real>(*b);
}
