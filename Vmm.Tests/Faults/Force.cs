using System.Text.Json.Nodes;

namespace Vmm.Tests.Faults;

/// <summary>How an operator starts a VM that is held because nobody knows whether the other side runs.</summary>
internal static class Force
{
    /// <summary>Arguments of <c>cont</c>; null where the program knows no force.</summary>
    internal static JsonObject? Arguments(FaultVm vm) => null;
}
