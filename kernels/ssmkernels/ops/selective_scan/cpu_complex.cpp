// The selective scan of complex states, forward.
#include "selective_scan/cpu_forward.h"

SSMZOO_EXPORT(selective_scan_complex)(const ssmzoo::ScanArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    return scan<Complex>(*a);
}
