using Iced.Intel;

namespace Vmm.Tools.Cli.Guests;

/// <summary>Turns assembled code into the flat binaries that <c>--kernel</c> takes.</summary>
internal static class GuestImage
{
    /// <summary>Where flat binaries go and start.</summary>
    internal const ulong FlatAddress = 0x100000;

    /// <summary>The code for its address.</summary>
    internal static byte[] Assemble(Assembler assembler, ulong address)
    {
        using var stream = new MemoryStream();
        assembler.Assemble(new StreamCodeWriter(stream), address);
        return stream.ToArray();
    }
}
