using System.Runtime.InteropServices;

namespace Vmm.Core.Interop;

internal static partial class LibC
{
    /// <summary>Returns only on failure. Both lists end with a null.</summary>
    [LibraryImport(Library, SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int execvpe(string file, [In] string?[] argv, [In] string?[] envp);
}
