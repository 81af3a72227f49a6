using System.Runtime.InteropServices;

namespace Vmm.Core.Interop;

internal static partial class LibC
{
    [LibraryImport(Library)]
    internal static partial uint geteuid();

    [LibraryImport(Library, SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int mkdir(string path, uint mode);
}
