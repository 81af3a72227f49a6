namespace Vmm.Core.Devices;

/// <summary>A package of device types and services (style: one word on a builder).</summary>
public interface IVmmPlugin
{
    /// <summary>Adds the plugin's factories and services.</summary>
    /// <param name="builder">The host's builder.</param>
    void Configure(VmmBuilder builder);
}
